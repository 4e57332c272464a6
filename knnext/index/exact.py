"""Exact search over a datastore of any size, in chunks.

`knn_search` goes on from a previous result, so a chunk is searched, its winners are carried into
the next chunk, and what comes out is what one search over all keys would give, ties included.

Where there are codes of the keys (knnext/index/codes.py), every code is read, and of the keys only
the rows that could be found; else every key. That is done once per call: give it many queries at
a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from knnext.devices import checked_device
from knnext.index.base import TokenTable
from knnext.index.chunk_reader import ChunkReader, default_resident_bytes
from knnext.index.chunks import (
    Chunk,
    answer_of,
    kept_by_each,
    labelled,
    parts_of,
    queries_of,
    those_together,
)
from knnext.index.code_choice import Codes, choose_codes, describe_choice
from knnext.index.filter import Filter
from knnext.index.queries import (
    QueryGroup,
    as_distances,
    check_count,
    check_k,
    prepare_queries,
)
from knnext.index.row_set import AnyOf
from knnext.index.tensors import ArrayLike, TensorStore, tensor_store
from knnext.index.wanted import wanted_rows
from knnext.ops import KeyCodes, knn_search, merge_topk

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.index.codes import StoredCodes

METRICS = ("l2", "ip")


class ExactIndex(TokenTable):
    """Exact nearest neighbors in a datastore, streamed in bounded memory.

    Args:
        datastore: an open `Datastore`; its rows must not change while the index is in use.
        metric: `"l2"` or `"ip"`; the datastore's own by default. Exact search can use either.
        device: where to search. Keys travel there chunk by chunk.
        chunk_bytes: bytes of keys (with codes: of codes) handled at once. On a GPU two such chunks
            are in flight.
        resident_bytes: codes, else keys, of at most this many bytes are kept on the device between
            calls. By default 2 GiB on the CPU and half of the free memory on a GPU.
        query_batch: queries per call of `knn_search`, whose workspace grows with them.
        refine: distances by direct subtraction (see `knn_search`), so that keys far from the
            origin are told apart and a key that is searched for lies at 0. False saves the second
            look at the winners, which many queries hide and a single one feels.
        codes: search by eight-bit codes of the keys, which finds the same to the last bit and
            reads of the keys only what could be found: `"auto"`, those that `knnext index S
            --kind codes` has put beside the datastore, where they are there and of it as it is now
            (other ones are passed over with a warning); True, the same or an error; False, none;
            or `StoredCodes`, or `KeyCodes` of these very keys. On the CPU only.
        verify: compare checksums of stored codes, which reads them all, once in a process.

    Raises:
        FileNotFoundError, IndexMismatchError: codes were insisted on and cannot be had.
    """

    def __init__(
        self,
        datastore: Datastore,
        *,
        metric: str | None = None,
        device: torch.device | str | None = None,
        chunk_bytes: int = 256 << 20,
        resident_bytes: int | None = None,
        query_batch: int = 4096,
        refine: bool = True,
        codes: Codes = "auto",
        verify: bool = True,
    ) -> None:
        self.datastore = datastore
        self.metric: str = datastore.metric if metric is None else metric
        if self.metric not in METRICS and self.metric != datastore.metric:
            raise ValueError(
                f"metric must be one of {METRICS}, got {metric!r}"
                + ("; ExactIndex.from_tensors searches by it" if metric == "cosine" else "")
            )
        self._cosine = self.metric == "cosine"
        self._op_metric = "ip" if self._cosine else self.metric
        self.device: torch.device = checked_device("cpu" if device is None else device)
        self.query_batch: int = check_count("query_batch", query_batch)
        self.refine: bool = bool(refine)
        self._asked = codes
        self._chunks = ChunkReader(
            datastore,
            self.device,
            choose_codes(datastore, codes, self.device, verify=verify),
            with_norms=self.metric == "l2",
            chunk_bytes=check_count("chunk_bytes", chunk_bytes),
            resident_bytes=resident_bytes,
        )
        self._generation = getattr(datastore, "generation", 0)

    @classmethod
    def from_tensors(
        cls,
        keys: ArrayLike,
        values: ArrayLike | None = None,
        *,
        metric: str = "l2",
        documents: ArrayLike | None = None,
        device: torch.device | str | None = None,
        codes: bool | str = False,
        **options: Any,
    ) -> ExactIndex:
        """An index of keys in memory, a tensor or a numpy array; `add` takes more.

        Keys in float16, bfloat16 or float32 that lie in one piece are searched where they are and
        not copied (float64 is rounded to float32): change them and the results change. Beside
        them an index keeps 4 bytes a row for `"l2"`, and what `codes` take.

        Args:
            keys: (N, D), finite.
            values: (N,) integers from 0, the rows' tokens, which a `KNNLM` looks up.
            metric: `"l2"`, `"ip"`, or `"cosine"`: keys are normalised once, into a copy of their
                dtype, and queries at each search; distances are 1 - cos, from 0 to 2. Zeros have a
                cosine of 0 with everything.
            documents: (N,) ids from 0 that never go back, for `exclude_documents`.
            device: where to search; by default where the keys are. From the CPU to a GPU they are
                copied once if they are within `resident_bytes`, else at each search.
            codes: True makes eight-bit codes of the keys now, 12 bytes a row and one a dimension.
            options: of `ExactIndex`.
        """
        if metric not in (*METRICS, "cosine"):
            raise ValueError(f"metric must be one of {(*METRICS, 'cosine')}, got {metric!r}")
        store = TensorStore(keys, values, metric, documents)
        device = store.device if device is None else device
        # It has all of a datastore that an index reads.
        return cls(cast("Datastore", store), device=device, codes=codes, **options)

    def add(
        self, keys: ArrayLike, values: ArrayLike | None = None, documents: ArrayLike | None = None
    ) -> None:
        """Rows behind those of an index that was made by `from_tensors`, all or none of them.

        Their dtype and device become those of the rows before; values and documents are given
        where these have them. Not while another thread searches.
        """
        store = tensor_store(self.datastore)
        if store is None:
            raise TypeError(
                f"add is for an index from tensors; {self.datastore.path} is a datastore, which "
                "grows by Datastore.create(..., resume=True)"
            )
        rows = store.add(keys, values, documents)
        if isinstance(self.codes, KeyCodes):
            self._chunks.choice = self._chunks.choice._replace(codes=store.encode(rows, self.codes))
        self._chunks.forget(store.given_rows)  # blocks behind the first may have been joined

    @property
    def codes(self) -> KeyCodes | StoredCodes | None:
        """What is searched by, if not the keys themselves."""
        return self._chunks.choice.codes

    @property
    def chunk_rows(self) -> int:
        """Rows that are handled at once, at most."""
        return self._chunks.chunk_rows

    @property
    def resident_bytes(self) -> int:
        """What is searched by stays in memory between calls where it is no larger."""
        return self._chunks.resident_bytes

    @property
    def resident(self) -> bool:
        """Whether what is searched by stays in memory between calls."""
        return self._chunks.resident

    def describe(self) -> str:
        """One line: what a search goes through, how many bytes of it, where they are kept."""
        return describe_choice(self.datastore, self._chunks.choice, self.resident_bytes)

    def search(
        self,
        queries: Tensor,
        k: int,
        exclude_documents: Tensor | Sequence[int] | None = None,
        *,
        filter: Filter | Sequence[Filter | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k nearest rows of each query, in order of (distance, index).

        Args:
            queries: (Q, dim), a tensor or a numpy array of any float dtype, rounded to the keys'
                dtype: keys were rounded when they were stored, and this way a query meets its own
                key at distance zero.
            k: neighbors per query. Past the number of rows the tail is padding.
            exclude_documents: None; an integer tensor (Q,) of one document a query, -1 for none;
                or a sequence of documents that no query may find. The result is the one of a
                datastore without those rows, whatever the size of the documents.
            filter: a `Filter` of what may be found, or a list of one (or None) for each query.
                Keys that no query may find are not read.

        Returns:
            `(distances, indices)`: (Q, k) float32 and (Q, k) int64, tensors on the queries'
            device. L2 squared, inner products negated, of `"cosine"` 1 - cos. Padding is +inf and
            -1.
        """
        self.follow_datastore()
        k = check_k(k)
        dim, dtype = self.datastore.dim, self.datastore.dtype
        rounded = prepare_queries(queries, dim, dtype, cosine=self._cosine)
        device, rounded = getattr(queries, "device", "cpu"), rounded.to(self.device)
        wanted = wanted_rows(
            self.datastore, rounded.shape[0], filter, exclude_documents, self.filter
        )
        found = self.search_groups(rounded, wanted.more(k), wanted.groups)
        distances, indices = wanted.finish(*found, k)
        return as_distances(distances, cosine=self._cosine).to(device), indices.to(device)

    def search_groups(
        self, queries: Tensor, k: int, groups: list[QueryGroup]
    ) -> tuple[Tensor, Tensor]:
        """`search` of (Q, dim) queries in the keys' dtype, on the index's device, in groups.

        Of `"cosine"` they are normalised, and distances are -cos.
        """
        count = queries.shape[0]
        distances = torch.full((count, k), float("inf"), dtype=torch.float32, device=self.device)
        indices = torch.full((count, k), -1, dtype=torch.int64, device=self.device)
        if groups:
            wanted = AnyOf([group.kept for group in groups])
            with self._chunks.reading_rows(count * k):
                for chunk in self._chunks.holding(wanted):
                    self._search_chunk(queries, chunk, groups, distances, indices)
        return distances, indices

    def _forget(self) -> None:
        """Rows have been deleted: what is kept of them is numbered otherwise now."""
        super()._forget()
        self._chunks.forget()
        if isinstance(self.codes, KeyCodes):
            raise ValueError(
                f"rows of {self.datastore.path} were deleted, and the codes that this index was "
                "given are of those before: make a new one"
            )
        if self.codes is not None:
            self._chunks.choice = choose_codes(
                self.datastore, self._asked, self.device, verify=False
            )

    def _search_chunk(
        self,
        queries: Tensor,
        chunk: Chunk,
        groups: list[QueryGroup],
        distances: Tensor,
        indices: Tensor,
    ) -> None:
        """Carry the results over one chunk, updating them in place."""
        whole, partly = [], []
        for group in groups:
            answer = answer_of(chunk, group)
            if answer is True:
                whole.append(group)
            elif answer is not False:  # of many groups masks would take too much memory
                partly.append((group, len(answer) - int(np.count_nonzero(answer))))
        if whole:
            rows = queries_of(whole, len(whole) == len(groups))
            self._search_rows(queries, rows, chunk, distances, indices)
        together, alone, more = those_together(partly, distances.shape[1])
        for group in alone:
            answer = answer_of(chunk, group)
            for part in parts_of(chunk, np.asarray(answer)):
                self._search_rows(queries, group.queries, part, distances, indices)
        if together:
            self._search_together(queries, together, more, chunk, distances, indices)

    def _search_rows(
        self,
        queries: Tensor,
        rows: Tensor | None,
        chunk: Chunk,
        distances: Tensor,
        indices: Tensor,
    ) -> None:
        """Search some queries (None: all of them) in one run of keys, in batches."""
        count = queries.shape[0] if rows is None else rows.numel()
        k = distances.shape[1]
        for begin in range(0, count, self.query_batch):
            batch: slice | Tensor = slice(begin, min(begin + self.query_batch, count))
            if rows is not None:
                batch = rows[batch].to(self.device)
            before = distances[batch], indices[batch]
            if chunk.rows is None:
                found = self._search_keys(queries[batch], chunk, k, *before)
            else:
                near, near_rows = self._search_alone(queries[batch], chunk, k)
                joined = torch.cat([before[0], near], 1), torch.cat([before[1], near_rows], 1)
                found = merge_topk(*joined, k)
            distances[batch], indices[batch] = found

    def _search_together(
        self,
        queries: Tensor,
        groups: list[QueryGroup],
        more: int,
        chunk: Chunk,
        distances: Tensor,
        indices: Tensor,
    ) -> None:
        """Groups each of which leaves out at most `more` rows of a chunk, in one search.

        It looks for as many rows more, of which each query drops those that it may not find.
        """
        k = distances.shape[1]
        rows, owners = labelled(groups)
        for part, own in zip(
            rows.split(self.query_batch), owners.split(self.query_batch), strict=True
        ):
            batch = part.to(self.device)
            near, near_rows = self._search_alone(queries[batch], chunk, k + more)
            near_rows = kept_by_each(near_rows, own, groups)
            near = torch.cat([distances[batch], near], 1)
            near_rows = torch.cat([indices[batch], near_rows], 1)
            distances[batch], indices[batch] = merge_topk(near, near_rows, k)

    def _search_alone(self, queries: Tensor, chunk: Chunk, k: int) -> tuple[Tensor, Tensor]:
        """The nearest rows of a chunk, at most k, whatever was found before."""
        near, places = self._search_keys(queries, chunk, min(k, chunk.keys.shape[0]))
        if chunk.rows is None:
            return near, places
        rows_of = torch.from_numpy(chunk.rows).to(self.device)
        return near, torch.where(places >= 0, rows_of[places.clamp_min(0)], places)

    def _search_keys(
        self,
        queries: Tensor,
        chunk: Chunk,
        k: int,
        distances: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Go on with a result in a chunk's keys; of gathered ones their places are found."""
        return knn_search(
            queries,
            chunk.keys,
            k,
            self._op_metric,
            key_sqnorms=chunk.sqnorms,
            index_offset=chunk.start if chunk.rows is None else 0,
            init_distances=distances,
            init_indices=indices,
            refine=self.refine,
            codes=chunk.codes,
        )


def describe_exact(
    datastore: Datastore, device: torch.device, codes: Codes = "auto"
) -> tuple[KeyCodes | StoredCodes | None, str]:
    """What an `ExactIndex` there would use and say of itself; no checksums are compared."""
    choice = choose_codes(datastore, codes, device, verify=False)
    line = describe_choice(datastore, choice, default_resident_bytes(device))
    return choice.codes, line
