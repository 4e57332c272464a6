"""Searching a FAISS index: its choice among the rows that may be found, and real distances."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.datastore.kept import KeptRows
from knnext.errors import IndexMismatchError
from knnext.index import faiss_library
from knnext.index.base import TokenTable
from knnext.index.filter import Filter
from knnext.index.queries import QueryGroup, as_distances, check_count, check_k, prepare_queries
from knnext.index.row_set import Masked, RowSet, Runs
from knnext.index.sidecar import Sidecar
from knnext.index.tensors import tensor_store
from knnext.index.wanted import wanted_rows
from knnext.ops import merge_topk, rescore

GPU_MAX_K = 2048
_QUERY_BATCH = 4096
_OVERFETCH_BYTES, _NEIGHBOR_BYTES = 256 << 20, 12


class FaissSearch(TokenTable):
    """The half of `FaissIndex` that searches."""

    metric: str
    nprobe: int
    rescore: bool
    gather_bytes: int
    _cosine: bool
    _op_metric: str
    _cpu_index: Any
    _gpu_index: Any | None
    _gpu: bool | str
    _setting: threading.Lock
    sidecar: Sidecar
    _alive: tuple[KeptRows, RowSet] | None = None

    def search(
        self,
        queries: Tensor,
        k: int,
        exclude_documents: Tensor | Sequence[int] | None = None,
        *,
        filter: Filter | Sequence[Filter | None] | None = None,
        rescore: bool | None = None,
        nprobe: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k neighbors that FAISS finds for each query, in order of (distance, index).

        Args:
            queries: (Q, dim), a tensor or a numpy array of any float dtype, rounded to the keys'
                dtype like those of the exact index, then given to FAISS in float32.
            k: neighbors per query. Where the lists visited hold fewer, the tail is padding.
            exclude_documents: None; an integer tensor (Q,) of one document a query, -1 for none;
                or a sequence of documents that no query may find.
            filter: a `Filter` of what may be found, or a list of one (or None) for each query. The
                rows are left out inside the search, as if they were not in the lists; kinds that
                take no filter (HNSW and other graphs, additive quantizers) are asked for as many
                rows more. GPUs are not used then: their indexes take none.
            rescore: recompute the distances of the rows found from the stored keys, and order by
                them (the paper's real score on a FAISS mask).
            nprobe: inverted lists to visit, instead of the index's own setting.

        Returns:
            `(distances, indices)`: (Q, k) float32 and (Q, k) int64 on the queries' device, with
            the conventions of `knn_search`: L2 squared, inner products negated, padding +inf and
            -1.
        """
        self.follow_datastore()
        k = check_k(k)
        dim, dtype = self.datastore.dim, self.datastore.dtype
        rounded = prepare_queries(queries, dim, dtype, cosine=self._cosine).cpu()
        device = getattr(queries, "device", "cpu")
        wanted = wanted_rows(
            self.datastore, rounded.shape[0], filter, exclude_documents, self.filter
        )
        found = self.search_groups(
            rounded, wanted.more(k), wanted.groups, rescore=rescore, nprobe=nprobe
        )
        distances, indices = wanted.finish(*found, k)
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
        stored = self._stored_rows
        for group in groups:
            kept = group.kept if stored is None else self._among_stored(group.kept, stored)
            for rows in _batches(group, count, _QUERY_BATCH):
                batch = faiss_library.as_float32(queries[rows])
                near, places = self._search_batch(batch, k, kept, nprobe)
                if stored is not None:
                    found = places >= 0
                    places = torch.where(found, stored.before(places.clamp_min(0)), places)
                distances[rows], indices[rows] = merge_topk(near, places, k)
        if self.rescore if rescore is None else rescore:
            distances, indices = self._rescore(queries, indices)
        return distances, indices

    def _forget(self) -> None:
        """Deleted rows are left out; after anything else the index is of another datastore."""
        super()._forget()
        if self.sidecar.recipe.datastore != self.datastore.undeleted().fingerprint:
            raise IndexMismatchError(
                f"{self.datastore.path} was written anew since its index was opened: build the "
                "index again"
            )

    @property
    def _stored_rows(self) -> KeptRows | None:
        """How the rows that FAISS knows are numbered, where some of them are deleted."""
        if tensor_store(self.datastore) is not None:
            return None
        kept: KeptRows | None = self.datastore.kept_rows
        return kept

    def _among_stored(self, wanted: RowSet, stored: KeptRows) -> RowSet:
        """The set, in stored numbers: nothing of what is deleted."""
        if wanted.everything:
            if self._alive is None or self._alive[0] is not stored:
                self._alive = stored, RowSet([Runs(stored.starts, stored.stops)])
            return self._alive[1]
        mask = np.zeros(stored.num_stored, dtype=bool)
        rows = torch.from_numpy(np.flatnonzero(wanted.mask(stored.count)))
        mask[stored.stored(rows).numpy()] = True
        return RowSet([Masked(mask)])

    def _search_batch(
        self, queries: NDArray[np.float32], k: int, kept: RowSet, nprobe: int
    ) -> tuple[Tensor, Tensor]:
        total = int(self._cpu_index.ntotal)
        if not kept.everything and kept.count(total) == 0:
            return (
                torch.full((len(queries), k), float("inf"), dtype=torch.float32, device="cpu"),
                torch.full((len(queries), k), -1, dtype=torch.int64, device="cpu"),
            )
        if self._gpu_index is not None and kept.everything and k <= GPU_MAX_K:
            with self._setting:
                if (replica := self._replica()) is not None:
                    faiss_library.set_nprobe(self._cpu_index, nprobe, replica)
                    return self._convert(*faiss_library.search(replica, queries, k))
        found = faiss_library.search_among(self._cpu_index, queries, k, nprobe, kept)
        if found is not None:
            return self._convert(*found)
        return self._overfetch(queries, k, kept, nprobe)

    def _replica(self) -> Any | None:
        """The index on GPUs, made again where rows were added since, to this object or to another
        with the same index."""
        if self._gpu_index is not None and self._gpu_index.ntotal != self._cpu_index.ntotal:
            self._gpu_index = None  # its memory, before the next one's
            self._gpu_index = faiss_library.to_gpu(self._cpu_index, self._gpu)
        return self._gpu_index

    def _overfetch(
        self, queries: NDArray[np.float32], k: int, kept: RowSet, nprobe: int
    ) -> tuple[Tensor, Tensor]:
        """For an index without filters: ask for as many rows more as could be left out."""
        total = int(self._cpu_index.ntotal)
        wanted = max(k, min(k + total - kept.count(total), total))
        step = max(1, _OVERFETCH_BYTES // (_NEIGHBOR_BYTES * wanted))
        parts = []
        for begin in range(0, len(queries), step):
            with self._setting:
                faiss_library.set_nprobe(self._cpu_index, nprobe)
                found = faiss_library.search(self._cpu_index, queries[begin : begin + step], wanted)
            distances, indices = self._convert(*found)
            allowed = indices >= 0
            answer = kept.among(indices[allowed].numpy())
            if answer is not True:
                allowed[allowed.clone()] = torch.as_tensor(answer, device="cpu")
            parts.append(merge_topk(distances, indices.masked_fill_(~allowed, -1), k))
        return torch.cat([d for d, _ in parts]), torch.cat([rows for _, rows in parts])

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


def _batches(group: QueryGroup, num_queries: int, size: int) -> list[slice | Tensor]:
    if group.queries is not None:
        return list(group.queries.split(size))
    return [slice(a, min(a + size, num_queries)) for a in range(0, num_queries, size)]
