"""Approximate search with FAISS: inverted lists of product codes as in the paper, or any factory.

FAISS chooses which k rows are kept (the mask). Their distances can be FAISS's own, computed from
the codes, or the real ones, recomputed from the stored keys (`rescore=True`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.index import faiss_build, faiss_library, faiss_parts
from knnext.index.base import TokenTable
from knnext.index.faiss_open import read_index
from knnext.index.queries import (
    QueryGroup,
    Range,
    as_distances,
    check_count,
    check_k,
    group_queries,
    prepare_queries,
)
from knnext.index.sidecar import Sidecar
from knnext.index.tensors import ArrayLike, TensorStore, tensor_store
from knnext.ops import merge_topk, rescore

if TYPE_CHECKING:
    from knnext.datastore import Datastore

DEFAULT_NPROBE = 32  # the paper's, of 4,096 lists
GPU_MAX_K = 2048
_QUERY_BATCH = 4096
_ADD_ROWS = 65_536


class FaissIndex(TokenTable):
    """Neighbors from a FAISS index over a datastore. Made by `build`, `open` or `from_tensors`."""

    def __init__(
        self,
        datastore: Datastore,
        index: Any,
        sidecar: Sidecar,
        path: Path,
        *,
        nprobe: int | None = None,
        rescore: bool = False,
        gather_bytes: int = 256 << 20,
        gpu: bool | str = "auto",
    ) -> None:
        self.datastore = datastore
        self.metric = datastore.metric
        self._cosine = self.metric == "cosine"
        self._op_metric = "ip" if self._cosine else self.metric
        self.sidecar = sidecar
        self.path = path
        self.nprobe = check_count("nprobe", sidecar.nprobe if nprobe is None else nprobe)
        self.rescore = rescore
        self.gather_bytes = check_count("gather_bytes", gather_bytes)
        self._gpu = gpu
        self._cpu_index = index
        self._gpu_index = faiss_library.to_gpu(index, gpu) if _use_gpu(gpu) else None
        #: Where nprobe is a setting of the index, which threads and copies of this object share.
        self._setting = threading.Lock()

    @classmethod
    def build(
        cls,
        datastore: Datastore,
        path: str | Path | None = None,
        factory: str | None = None,
        *,
        train_size: int | None = None,
        seed: int = 1,
        nprobe: int | None = None,
        add_chunk: int = 65_536,
        segment_rows: int | None = None,
        gpu: bool | str = "auto",
        overwrite: bool = False,
        rescore: bool = False,
        parts: int | None = None,
        rank: tuple[int, int] = (0, 1),
    ) -> FaissIndex:
        """Build the index of a datastore, or go on with a build that was interrupted.

        A finished index of the same recipe is opened as it is. Memory: the training sample in
        float32 (`train_size` x dim x 4 bytes), then the codes.

        Args:
            datastore: an open datastore; all of its rows are indexed.
            path: the folder of the index; `<datastore folder>.index` beside it by default.
            factory: FAISS factory string; by default `IVF4096,PQ64` as in the paper, scaled down
                to the data (see `faiss_build.default_factory`).
            train_size: rows drawn for training without replacement; by default 256 a list, at
                least 65,536 and at most 1,000,000 (the paper's number).
            seed: of the sample and of k-means.
            nprobe: inverted lists visited per query, kept with the index; 32 as in the paper.
            add_chunk: rows converted to float32 at once (`add_chunk` x dim x 4 bytes).
            segment_rows: rows between two checkpoints; by default 1,048,576 or N / 32.
            gpu: True, False or `"auto"`: use GPUs where this FAISS sees any.
            overwrite: discard whatever index, finished or not, is in the folder.
            rescore: see `search`.
            parts: several processes share the segments, of which there are then so many or more;
                one trains, the last one merges, each returns when that is done. By default two for
                each of the processes that `rank` tells of.
            rank: of how many: which segments this process begins with.

        Raises:
            IndexMismatchError: the folder holds an index of another recipe.
            DatastoreLockedError: another process is building an index in the folder.
            ValueError: a factory string or size that does not suit the datastore.
        """
        folder = default_path(datastore) if path is None else Path(path)
        nprobe = check_count("nprobe", DEFAULT_NPROBE if nprobe is None else nprobe)
        recipe = faiss_build.make_recipe(datastore, factory, train_size, seed, segment_rows)
        alone = parts is None and rank[1] == 1
        if overwrite and not alone:
            raise ValueError(
                "overwrite is for one process, as each of several would discard what the others "
                f"have made: remove {folder} first"
            )
        if segment_rows is None and not overwrite:
            recipe = faiss_parts.cut_recipe(folder, recipe, parts, rank[1])
        options: dict[str, Any] = {
            "nprobe": nprobe,
            "add_chunk": check_count("add_chunk", add_chunk),
            "gpu": _use_gpu(gpu) and gpu,
        }
        if alone and (overwrite or not faiss_parts.is_planned(folder)):
            faiss_build.build(datastore, folder, recipe, overwrite=overwrite, **options)
        else:
            faiss_parts.build_parts(datastore, folder, recipe, rank=rank, **options)
        return cls.open(folder, datastore, nprobe=nprobe, gpu=gpu, rescore=rescore)

    @classmethod
    def build_part(
        cls,
        datastore: Datastore,
        part: tuple[int, int],
        path: str | Path | None = None,
        factory: str | None = None,
        *,
        train_size: int | None = None,
        seed: int = 1,
        nprobe: int | None = None,
        add_chunk: int = 65_536,
        gpu: bool | str = "auto",
    ) -> FaissIndex | None:
        """Add one part's segments alone: (3, 64) is the third of 64. The index, if it is whole now.

        The first part that is begun trains, and the others wait for it. Arguments as of `build`.
        """
        folder = default_path(datastore) if path is None else Path(path)
        nprobe = check_count("nprobe", DEFAULT_NPROBE if nprobe is None else nprobe)
        recipe = faiss_build.make_recipe(datastore, factory, train_size, seed, None)
        whole = faiss_parts.build_parts(
            datastore,
            folder,
            faiss_parts.cut_recipe(folder, recipe, part[1], 1),
            nprobe=nprobe,
            add_chunk=check_count("add_chunk", add_chunk),
            gpu=_use_gpu(gpu) and gpu,
            part=part,
        )
        return cls.open(folder, datastore, nprobe=nprobe, gpu=gpu) if whole else None

    @classmethod
    def open(
        cls,
        path: str | Path | None,
        datastore: Datastore,
        *,
        nprobe: int | None = None,
        rescore: bool = False,
        gather_bytes: int = 256 << 20,
        gpu: bool | str = "auto",
        verify: bool = True,
    ) -> FaissIndex:
        """Open a finished index (None: the default place) with the datastore it was built from.

        `verify` reads the file once more and compares its checksum.

        Raises:
            FileNotFoundError: there is no finished index in the folder.
            IndexMismatchError: the index is damaged, or was built from another datastore, with
                another metric or for another number of rows.
        """
        folder = default_path(datastore) if path is None else Path(path)
        sidecar, index = read_index(folder, datastore, verify)
        return cls(
            datastore,
            index,
            sidecar,
            folder,
            nprobe=nprobe,
            rescore=rescore,
            gather_bytes=gather_bytes,
            gpu=gpu,
        )

    @classmethod
    def from_tensors(
        cls,
        keys: ArrayLike,
        values: ArrayLike | None = None,
        *,
        metric: str = "l2",
        factory: str | None = None,
        documents: ArrayLike | None = None,
        train_size: int | None = None,
        seed: int = 1,
        nprobe: int | None = None,
        rescore: bool = False,
        gpu: bool | str = "auto",
    ) -> FaissIndex:
        """An index in memory of keys in memory, a tensor or a numpy array; `add` takes more.

        The keys stay as they are beside FAISS's codes of them, for `rescore`: see
        `ExactIndex.from_tensors`, also for `values`, `documents` and metric `"cosine"`. The others
        are as of `build`. ValueError for keys that are too few to train the factory's index.
        """
        if metric not in ("l2", "ip", "cosine"):
            raise ValueError(f"metric must be one of ('l2', 'ip', 'cosine'), got {metric!r}")
        store = TensorStore(keys, values, metric, documents)
        rows = cast("Datastore", store)  # it has all of a datastore that an index reads
        kind = "ip" if metric == "cosine" else metric
        recipe = faiss_build.make_recipe(rows, factory, train_size, seed, None, metric=kind)
        index = faiss_build.trained(rows, recipe, _use_gpu(gpu) and gpu)
        _add_in_pieces(index, store.keys[0 : len(store)])
        nprobe = check_count("nprobe", DEFAULT_NPROBE if nprobe is None else nprobe)
        sidecar = Sidecar(recipe, nprobe, faiss_library.version(), 0, "")
        return cls(rows, index, sidecar, Path(), rescore=rescore, gpu=gpu)

    def add(
        self, keys: ArrayLike, values: ArrayLike | None = None, documents: ArrayLike | None = None
    ) -> None:
        """Rows behind those of an index that was made by `from_tensors`; see `ExactIndex.add`.

        They are coded by what the first keys trained.
        """
        store = tensor_store(self.datastore)
        if store is None:
            raise TypeError(
                f"add is for an index from tensors; {self.path} is of the datastore "
                f"{self.datastore.path}: append there, and build the index again"
            )
        _add_in_pieces(self._cpu_index, store.add(keys, values, documents))
        if self._gpu_index is not None:
            self._gpu_index = faiss_library.to_gpu(self._cpu_index, self._gpu)
        self._values = None

    @property
    def factory(self) -> str:
        """The FAISS factory string the index was built with."""
        return self.sidecar.recipe.factory

    @property
    def num_bytes(self) -> int:
        """Size of the index file; 0 of an index that has none."""
        return self.sidecar.num_bytes

    def with_options(self, *, nprobe: int | None = None, rescore: bool | None = None) -> FaissIndex:
        """The same index in memory, searched with other settings by default."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.nprobe = self.nprobe if nprobe is None else check_count("nprobe", nprobe)
        other.rescore = self.rescore if rescore is None else rescore
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the place and the settings, and opens the index there again.

        Of one from tensors it holds all.
        """
        options: dict[str, Any] = {"nprobe": self.nprobe, "rescore": self.rescore}
        options |= {"gather_bytes": self.gather_bytes, "gpu": self._gpu}
        if tensor_store(self.datastore) is not None:
            content = faiss_library.to_bytes(self._cpu_index)
            return _unpickled, (self.datastore, content, self.sidecar, options)
        options["verify"] = False
        return _reopen, (self.path.absolute(), self.datastore, options)

    def search(
        self,
        queries: Tensor,
        k: int,
        exclude_documents: Tensor | Sequence[int] | None = None,
        *,
        rescore: bool | None = None,
        nprobe: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k neighbors that FAISS finds for each query, in order of (distance, index).

        Args:
            queries: (Q, dim), a tensor or a numpy array of any float dtype, rounded to the keys'
                dtype like those of the exact index, then given to FAISS in float32.
            k: neighbors per query. Where the lists visited hold fewer, the tail is padding.
            exclude_documents: None; an integer tensor (Q,) of one document a query, -1 for none;
                or a sequence of documents that no query may find. The rows are left out inside
                the search, as if they were not in the lists. With this, GPUs are not used: their
                indexes take no filter.
            rescore: recompute the distances of the rows found from the stored keys, and order by
                them (the paper's real score on a FAISS mask).
            nprobe: inverted lists to visit, instead of the index's own setting.

        Returns:
            `(distances, indices)`: (Q, k) float32 and (Q, k) int64 on the queries' device, with
            the conventions of `knn_search`: L2 squared, inner products negated, padding +inf and
            -1.
        """
        k = check_k(k)
        dim, dtype = self.datastore.dim, self.datastore.dtype
        rounded = prepare_queries(queries, dim, dtype, cosine=self._cosine).cpu()
        device = getattr(queries, "device", "cpu")
        offsets = self.datastore.document_offsets
        groups = group_queries(exclude_documents, offsets, rounded.shape[0])
        distances, indices = self.search_groups(rounded, k, groups, rescore=rescore, nprobe=nprobe)
        return as_distances(distances, cosine=self._cosine).to(device), indices.to(device)

    def search_groups(
        self,
        queries: Tensor,
        k: int,
        groups: list[QueryGroup],
        *,
        rescore: bool | None = None,
        nprobe: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`search` of (Q, dim) queries in the keys' dtype, on the CPU, in groups."""
        nprobe = self.nprobe if nprobe is None else check_count("nprobe", nprobe)
        count = queries.shape[0]
        distances = torch.full((count, k), float("inf"), dtype=torch.float32, device="cpu")
        indices = torch.full((count, k), -1, dtype=torch.int64, device="cpu")
        for group in groups:
            for rows in _batches(group, count, _QUERY_BATCH):
                batch = faiss_library.as_float32(queries[rows])
                found = self._search_batch(batch, k, group.excluded, nprobe)
                distances[rows], indices[rows] = merge_topk(*found, k)
        if self.rescore if rescore is None else rescore:
            distances, indices = self._rescore(queries, indices)
        return distances, indices

    def decode(self, rows: Tensor) -> Tensor:
        """(m, D) float32 vectors that the codes of (m,) rows stand for, on the CPU.

        A search scores a row by its distance to this vector. ValueError for a row that the index
        does not hold, and for an index whose codes cannot be decoded.
        """
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.datastore):
            raise ValueError(
                f"rows must lie in [0, {len(self.datastore)}), got {int(rows.min())} to "
                f"{int(rows.max())}"
            )
        return faiss_library.decode(self._cpu_index, rows)

    def _search_batch(
        self, queries: NDArray[np.float32], k: int, excluded: tuple[Range, ...], nprobe: int
    ) -> tuple[Tensor, Tensor]:
        if self._gpu_index is not None and not excluded and k <= GPU_MAX_K:
            with self._setting:
                faiss_library.set_nprobe(self._cpu_index, nprobe, self._gpu_index)
                return self._convert(*faiss_library.search(self._gpu_index, queries, k))
        found = faiss_library.search_without(self._cpu_index, queries, k, nprobe, excluded)
        if found is not None:
            return self._convert(*found)
        return self._overfetch(queries, k, excluded, nprobe)

    def _overfetch(
        self, queries: NDArray[np.float32], k: int, excluded: tuple[Range, ...], nprobe: int
    ) -> tuple[Tensor, Tensor]:
        """For an index without filters: ask for as many rows more as could be dropped."""
        more = sum(stop - start for start, stop in excluded)
        wanted = min(k + more, max(k, self.datastore.num_entries))
        with self._setting:
            faiss_library.set_nprobe(self._cpu_index, nprobe)
            found = faiss_library.search(self._cpu_index, queries, wanted)
        distances, indices = self._convert(*found)
        for start, stop in excluded:
            indices.masked_fill_((indices >= start) & (indices < stop), -1)
        return distances, indices

    def _convert(
        self, distances: NDArray[np.float32], indices: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """FAISS's scores as distances: similarities negated, rounding below zero cut off."""
        found = torch.from_numpy(distances)
        # Table look-ups can push the distance of a near-identical code just below zero.
        found = -found if self._op_metric == "ip" else found.clamp_min(0)
        rows = torch.from_numpy(indices)
        return found.masked_fill_(rows < 0, float("inf")), rows

    def _rescore(self, queries: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Real distances of the rows found, a batch of queries at a time.

        A batch's rows are read once each and in ascending order, so that a memory map is read
        forwards; `gather_bytes` bounds what is held.
        """
        k = indices.shape[1]
        row_bytes = self.datastore.dim * self.datastore.dtype.itemsize
        step = max(1, self.gather_bytes // (k * row_bytes))
        distances = torch.full(indices.shape, float("inf"), dtype=torch.float32, device="cpu")
        for begin in range(0, queries.shape[0], step):
            part = slice(begin, begin + step)
            rows, local = indices[part].unique(return_inverse=True)  # ascending, -1 first
            padding = int(rows.numel() > 0 and rows[0] < 0)
            keys = self.datastore.keys[rows[padding:]]
            scores = rescore(queries[part], keys.cpu(), local - padding, self._op_metric)
            distances[part], indices[part] = merge_topk(scores, indices[part], k)
        return distances, indices


def _reopen(path: Path, datastore: Datastore, options: dict[str, Any]) -> FaissIndex:
    return FaissIndex.open(path, datastore, **options)


def _unpickled(
    datastore: Datastore, content: NDArray[np.uint8], sidecar: Sidecar, options: dict[str, Any]
) -> FaissIndex:
    index = faiss_library.from_bytes(content)
    return FaissIndex(datastore, index, sidecar, Path(), **options)


def _add_in_pieces(index: Any, keys: Tensor) -> None:
    """(n, D) keys, of which few are float32 at once."""
    for part in keys.split(_ADD_ROWS):
        faiss_library.add(index, faiss_library.as_float32(part))


def default_path(datastore: Datastore) -> Path:
    """`<datastore folder>.index`, beside the datastore's folder."""
    folder = Path(datastore.path).resolve()
    return folder.with_name(folder.name + ".index")


def _batches(group: QueryGroup, num_queries: int, size: int) -> list[slice | Tensor]:
    if group.queries is not None:
        return list(group.queries.split(size))
    return [slice(a, min(a + size, num_queries)) for a in range(0, num_queries, size)]


def _use_gpu(gpu: bool | str) -> bool:
    if gpu not in (True, False, "auto"):
        raise ValueError(f'gpu must be True, False or "auto", got {gpu!r}')
    if gpu is False:
        return False
    available = faiss_library.num_gpus() > 0
    if gpu is True and not available:
        raise ValueError("gpu=True, but this FAISS sees no GPU")
    return available
