"""Approximate search with FAISS: inverted lists of product codes as in the paper, or any factory.

FAISS chooses which k rows are kept (the mask). Their distances can be FAISS's own, computed from
the codes, or the real ones, recomputed from the stored keys (`rescore=True`).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.index import faiss_build, faiss_library, faiss_parts
from knnext.index.faiss_adopt import adopt
from knnext.index.faiss_open import read_index
from knnext.index.faiss_search import FaissSearch
from knnext.index.faiss_tensors import add_in_pieces, index_of
from knnext.index.queries import (
    check_count,
)
from knnext.index.sidecar import Sidecar
from knnext.index.tensors import ArrayLike, TensorStore, tensor_store

if TYPE_CHECKING:
    from knnext.datastore import Datastore

DEFAULT_NPROBE = 32  # the paper's, of 4,096 lists


class FaissIndex(FaissSearch):
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
        self._generation = getattr(datastore, "generation", 0)
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
            datastore: an open datastore; all of its rows are indexed, also those that are deleted
                and still stored, which no search finds.
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
        stored = datastore.undeleted()
        recipe = faiss_build.make_recipe(stored, factory, train_size, seed, segment_rows)
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
            faiss_build.build(stored, folder, recipe, overwrite=overwrite, **options)
        else:
            faiss_parts.build_parts(stored, folder, recipe, rank=rank, **options)
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
        stored = datastore.undeleted()
        recipe = faiss_build.make_recipe(stored, factory, train_size, seed, None)
        whole = faiss_parts.build_parts(
            stored,
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
    def adopt(
        cls,
        datastore: Datastore,
        file: str | Path,
        path: str | Path | None = None,
        *,
        nprobe: int | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> FaissIndex:
        """Take a FAISS index that another program built over the same keys, in the same order.

        It is read, checked and written into the index's folder, with what was checked beside it
        (``sidecar.adopted``): metric, dimensions, number of rows, sampled rows decoded and compared
        with their keys, sampled keys searched. The zeros at the end that an import left out are
        removed from it. It is held in memory meanwhile.

        Args:
            datastore: an open datastore.
            file: what ``faiss.write_index`` wrote. One that maps rows to ids of its own is refused.
            path: the folder of the index; beside the datastore by default.
            nprobe: lists to visit, kept with the index; 32 by default.
            overwrite: discard an index that is in the folder.
            options: of `open`.

        Raises:
            IndexMismatchError: it is not of these keys, or of these in another order; or there is
                an index already.
        """
        folder = default_path(datastore) if path is None else Path(path)
        nprobe = check_count("nprobe", DEFAULT_NPROBE if nprobe is None else nprobe)
        adopt(datastore, Path(file), folder, nprobe=nprobe, overwrite=overwrite)
        return cls.open(folder, datastore, **options)

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
        index, sidecar = index_of(
            store,
            factory,
            train_size=train_size,
            seed=seed,
            nprobe=check_count("nprobe", DEFAULT_NPROBE if nprobe is None else nprobe),
            gpu=_use_gpu(gpu) and gpu,
        )
        rows = cast("Datastore", store)  # it has all of a datastore that an index reads
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
        add_in_pieces(self._cpu_index, store.add(keys, values, documents))

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
        kept = self._stored_rows
        stored = rows.to("cpu", torch.int64)
        return faiss_library.decode(
            self._cpu_index, stored if kept is None else kept.stored(stored)
        )


def _reopen(path: Path, datastore: Datastore, options: dict[str, Any]) -> FaissIndex:
    return FaissIndex.open(path, datastore, **options)


def _unpickled(
    datastore: Datastore, content: NDArray[np.uint8], sidecar: Sidecar, options: dict[str, Any]
) -> FaissIndex:
    index = faiss_library.from_bytes(content)
    return FaissIndex(datastore, index, sidecar, Path(), **options)


def default_path(datastore: Datastore) -> Path:
    """`<datastore folder>.index`, beside the datastore's folder."""
    folder = Path(datastore.path).resolve()
    return folder.with_name(folder.name + ".index")


def _use_gpu(gpu: bool | str) -> bool:
    if gpu not in (True, False, "auto"):
        raise ValueError(f'gpu must be True, False or "auto", got {gpu!r}')
    if gpu is False:
        return False
    available = faiss_library.num_gpus() > 0
    if gpu is True and not available:
        raise ValueError("gpu=True, but this FAISS sees no GPU")
    return available
