"""Exact search over a datastore of any size, in chunks.

`knn_search` goes on from a previous result, so a chunk is searched, its winners are carried into
the next chunk, and what comes out is what one search over all keys would give, ties included.

Where there are codes of the keys (knnext/index/codes.py), every code is read, and of the keys only
the rows that could be found; else every key. That is done once per call: give it many queries at
a time.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from knnext.devices import checked_device
from knnext.index.base import TokenTable
from knnext.index.chunks import Chunk, parts_of, queries_of
from knnext.index.code_choice import Codes, choose_codes, describe_choice
from knnext.index.codes_meta import STATS_BYTES
from knnext.index.filter import Filter
from knnext.index.queries import (
    QueryGroup,
    as_distances,
    check_count,
    check_k,
    prepare_queries,
)
from knnext.index.row_set import AnyOf, plan
from knnext.index.tensors import ArrayLike, TensorStore, tensor_store
from knnext.index.wanted import wanted_rows
from knnext.ops import KeyCodes, key_sqnorms, knn_search, merge_topk

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.index.codes import StoredCodes

METRICS = ("l2", "ip")


# Rows that few queries look for are read one by one, those of many with all that lies between: a
# disk reads about so many rows on end while it finds one.
_ROWS_ON_END = 128
_PAGES_A_ROW = 64  # of a disk, for each row looked for: far more than likely rows make


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
        self._choice = choose_codes(datastore, codes, self.device, verify=verify)
        self._asked = codes
        self._generation = getattr(datastore, "generation", 0)
        rows = check_count("chunk_bytes", chunk_bytes) // self._row_bytes()
        self.chunk_rows: int = max(1, rows)
        if resident_bytes is None:
            resident_bytes = _default_resident_bytes(self.device)
        self.resident_bytes = resident_bytes
        self._keep = datastore.num_entries * self._row_bytes() <= resident_bytes
        self._resident: list[Chunk] | None = None
        self._scattered = True
        self._sqnorms: dict[tuple[int, int], Tensor] = {}

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
            self._choice = self._choice._replace(codes=store.encode(rows, self.codes))
        self._keep = store.num_entries * self._row_bytes() <= self.resident_bytes
        self._resident = self._values = None
        # Blocks behind the first may have been joined.
        given = store.given_rows
        self._sqnorms = {at: norms for at, norms in self._sqnorms.items() if at[0] < given}

    @property
    def codes(self) -> KeyCodes | StoredCodes | None:
        """What is searched by, if not the keys themselves."""
        return self._choice.codes

    @property
    def resident(self) -> bool:
        """Whether what is searched by stays in memory between calls."""
        return self._keep

    def describe(self) -> str:
        """One line: what a search goes through, how many bytes of it, where they are kept."""
        return describe_choice(self.datastore, self._choice, self.resident_bytes)

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
            with self._reading(count * k):
                for chunk in self._chunks(AnyOf([group.kept for group in groups])):
                    self._search_chunk(queries, chunk, groups, distances, indices)
        return distances, indices

    def _forget(self) -> None:
        """Rows have been deleted: what is kept of them is numbered otherwise now."""
        super()._forget()
        self._resident, self._sqnorms = None, {}
        if isinstance(self.codes, KeyCodes):
            raise ValueError(
                f"rows of {self.datastore.path} were deleted, and the codes that this index was "
                "given are of those before: make a new one"
            )
        if self.codes is not None:
            self._choice = choose_codes(self.datastore, self._asked, self.device, verify=False)

    def __getstate__(self) -> dict[str, Any]:
        """What the datastore holds is left out and read again where it is wanted."""
        return {**super().__getstate__(), "_resident": None, "_sqnorms": {}}

    def _search_chunk(
        self,
        queries: Tensor,
        chunk: Chunk,
        groups: list[QueryGroup],
        distances: Tensor,
        indices: Tensor,
    ) -> None:
        """Carry the results over one chunk, updating them in place."""
        whole = []
        for group in groups:
            if chunk.rows is None:
                answer = group.kept.window(chunk.start, chunk.stop)
            else:
                answer = group.kept.among(chunk.rows)
            if answer is True:
                whole.append(group)
            elif answer is not False:
                for part in parts_of(chunk, answer):
                    self._search_rows(queries, group.queries, part, distances, indices)
        if whole:
            rows = queries_of(whole, len(whole) == len(groups))
            self._search_rows(queries, rows, chunk, distances, indices)

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
                near, places = self._search_keys(queries[batch], chunk, min(k, len(chunk.rows)))
                rows_of = torch.from_numpy(chunk.rows).to(self.device)
                near_rows = torch.where(places >= 0, rows_of[places.clamp_min(0)], places)
                joined = torch.cat([before[0], near], 1), torch.cat([before[1], near_rows], 1)
                found = merge_topk(*joined, k)
            distances[batch], indices[batch] = found

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

    def _row_bytes(self) -> int:
        """Bytes of a row of what is searched through; keys beside codes are mapped, or copied."""
        keys = self.datastore.meta.row_bytes
        if self.codes is None:
            return keys
        return self.codes.dim + STATS_BYTES + (keys if self.datastore.keys.selected else 0)

    @contextmanager
    def _reading(self, wanted: int) -> Iterator[None]:
        """Within, rows of keys are read from a disk as suits where so many are looked for."""
        keys = self.datastore.keys
        few = self.codes is not None and wanted * _ROWS_ON_END < len(keys)
        stored = len(keys) * self.datastore.meta.row_bytes > self.resident_bytes
        if not (few and stored and self._scattered):
            yield
            return
        before = _pages_read()
        with keys.scattered():
            yield
        # Page by page is no way to read everything: what codes leave open, they may leave again.
        self._scattered = _pages_read() - before < _PAGES_A_ROW * wanted + _ROWS_ON_END

    def _chunks(self, wanted: AnyOf) -> Iterator[Chunk]:
        """Chunks that hold the wanted rows: from memory where they are kept, else as they are read.

        What nobody wants is not read, but where all is to stay on a GPU, and half of it is wanted.
        """
        if self._resident is not None:
            yield from (c for c in self._resident if wanted.window(c.start, c.stop) is not False)
            return
        if not wanted.everything:
            count = self.datastore.num_entries
            stay = self._keep and self.device.type != "cpu"
            if not (stay and 2 * wanted.count(count) >= count):
                yield from self._wanted_chunks(wanted)
                return
        if self.codes is not None and not self.datastore.keys.selected:
            yield from self._coded_chunks(self.codes)
            return
        kept: list[Chunk] = []
        for start, keys in self._read():
            chunk = Chunk(start, keys, self._norms(start, keys), self._codes_of(start, keys))
            if self._keep:
                kept.append(chunk)
            yield chunk
        # Only a pass that went to its end has seen every chunk.
        if self._keep:
            self._resident = kept

    def _coded_chunks(self, codes: KeyCodes | StoredCodes) -> Iterator[Chunk]:
        """Chunks that hold no copy of anything: keys and codes are mapped, or given."""
        for first, last in self.datastore.keys.pieces(self.chunk_rows):
            yield Chunk(first, self.datastore.keys[first:last], None, codes[first:last])

    def _wanted_chunks(self, wanted: AnyOf) -> Iterator[Chunk]:
        """Long runs of wanted rows, mapped where they are on the CPU; and the others, gathered."""
        keys, places = self.datastore.keys, []

        def read() -> Iterator[tuple[int, Tensor]]:
            for (first, last), rows in plan(wanted, keys.pieces(self.chunk_rows), self.chunk_rows):
                places.append((first, rows))
                found = keys[first:last] if rows is None else keys[torch.from_numpy(rows)]
                yield len(places) - 1, found

        for number, found in self._on_device(read(), reuse_buffers=True):
            first, rows = places[number]
            if rows is None:
                sqnorms = self._sqnorms.get((first, len(found)))
                yield Chunk(first, found, sqnorms, self._codes_of(first, found))
            else:  # whose keys have been read: codes would save no reading
                yield Chunk(first, found, None, None, rows)

    def _codes_of(self, start: int, keys: Tensor) -> KeyCodes | None:
        return None if self.codes is None else self.codes[start : start + len(keys)]

    def _read(self) -> Iterator[tuple[int, Tensor]]:
        chunks = ((a, keys) for a, keys, _ in self.datastore.iter_chunks(self.chunk_rows))
        # Chunks that stay must each have memory of their own; others share two buffers.
        return self._on_device(chunks, reuse_buffers=not self._keep)

    def _on_device(
        self, chunks: Iterator[tuple[int, Tensor]], *, reuse_buffers: bool
    ) -> Iterator[tuple[int, Tensor]]:
        if self.device == getattr(self.datastore, "device", torch.device("cpu")):
            return chunks
        from knnext.index.transfer import prefetch_to_device

        return prefetch_to_device(chunks, self.device, reuse_buffers=reuse_buffers)

    def _norms(self, start: int, keys: Tensor) -> Tensor | None:
        """Squared norms of a chunk: N float32 in all, computed once and kept."""
        if self.metric != "l2" or self.codes is not None:
            return None
        at = (start, len(keys))
        if at not in self._sqnorms:
            self._sqnorms[at] = key_sqnorms(keys)
        return self._sqnorms[at]


def _pages_read() -> int:
    """So far, by this process, for memory that is mapped from files."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def describe_exact(
    datastore: Datastore, device: torch.device, codes: Codes = "auto"
) -> tuple[KeyCodes | StoredCodes | None, str]:
    """What an `ExactIndex` there would use and say of itself; no checksums are compared."""
    choice = choose_codes(datastore, codes, device, verify=False)
    line = describe_choice(datastore, choice, _default_resident_bytes(device))
    return choice.codes, line


def _default_resident_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 2 << 30
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2
