"""Where the chunks of an exact search come from: from memory, or as they are read.

All are kept on the device after the first search where they are small enough. What a filter leaves
out is not read, and keys beside codes of them are mapped, so that only likely rows are.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knnext.index.chunks import Chunk
from knnext.index.code_choice import Choice
from knnext.index.codes_meta import STATS_BYTES
from knnext.index.row_set import AnyOf, plan
from knnext.ops import KeyCodes, key_sqnorms

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.index.codes import StoredCodes

# Rows that few queries look for are read one by one, those of many with all that lies between: a
# disk reads about so many rows on end while it finds one.
_ROWS_ON_END = 128
_PAGES_A_ROW = 64  # of a disk, for each row looked for: far more than likely rows make


def default_resident_bytes(device: torch.device) -> int:
    """What may stay on a device where nobody has said: 2 GiB, of a GPU half of what is free."""
    if device.type != "cuda":
        return 2 << 30
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2


class ChunkReader:
    """A datastore's keys and their codes on a device, in chunks.

    Args:
        choice: the codes to search by, if any.
        with_norms: give the squared norms of keys, where there are no codes of them.
        chunk_bytes: of keys (with codes: of codes) in a chunk.
        resident_bytes: of them in all, at most, that stay on the device; None: the default.

    Attributes:
        choice: as given; whoever sets another says `forget` too.
    """

    def __init__(
        self,
        datastore: Datastore,
        device: torch.device,
        choice: Choice,
        *,
        with_norms: bool,
        chunk_bytes: int,
        resident_bytes: int | None,
    ) -> None:
        self._datastore, self._device, self.choice = datastore, device, choice
        self._with_norms, self._chunk_bytes = with_norms, chunk_bytes
        if resident_bytes is None:
            resident_bytes = default_resident_bytes(device)
        self.resident_bytes: int = resident_bytes
        self._kept: list[Chunk] | None = None
        self._sqnorms: dict[tuple[int, int], Tensor] = {}
        self._scattered = True

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, at most."""
        return max(1, self._chunk_bytes // self._row_bytes())

    @property
    def resident(self) -> bool:
        """Whether what is searched by stays in memory between passes."""
        return self._datastore.num_entries * self._row_bytes() <= self.resident_bytes

    def forget(self, first: int = 0) -> None:
        """Rows from `first` on are others now, or more."""
        self._kept = None
        self._sqnorms = {at: norms for at, norms in self._sqnorms.items() if at[0] < first}

    def __getstate__(self) -> dict[str, Any]:
        """What the datastore holds is left out and read again where it is wanted."""
        return {**self.__dict__, "_kept": None, "_sqnorms": {}}

    def holding(self, wanted: AnyOf) -> Iterator[Chunk]:
        """Chunks that hold the wanted rows.

        What nobody wants is not read, but where all is to stay on a GPU, and half of it is wanted.
        """
        if self._kept is not None:
            yield from (c for c in self._kept if wanted.window(c.start, c.stop) is not False)
            return
        keep, codes = self.resident, self.choice.codes
        if not wanted.everything:
            count = self._datastore.num_entries
            stay = keep and self._device.type != "cpu"
            if not (stay and 2 * wanted.count(count) >= count):
                yield from self._runs_and_rows(wanted)
                return
        if codes is not None and not self._datastore.keys.selected:
            yield from self._mapped(codes)
            return
        kept: list[Chunk] = []
        for start, keys in self._read(keep):
            chunk = Chunk(start, keys, self._norms(start, keys), self._codes_of(start, keys))
            if keep:
                kept.append(chunk)
            yield chunk
        # Only a pass that went to its end has seen every chunk.
        if keep:
            self._kept = kept

    @contextmanager
    def reading_rows(self, count: int) -> Iterator[None]:
        """Within, keys are read from a disk as suits where `count` rows are looked for by codes."""
        keys = self._datastore.keys
        few = self.choice.codes is not None and count * _ROWS_ON_END < len(keys)
        stored = len(keys) * self._datastore.meta.row_bytes > self.resident_bytes
        if not (few and stored and self._scattered):
            yield
            return
        before = _pages_read()
        with keys.scattered():
            yield
        # Page by page is no way to read everything: what codes leave open, they may leave again.
        self._scattered = _pages_read() - before < _PAGES_A_ROW * count + _ROWS_ON_END

    def _row_bytes(self) -> int:
        """Bytes of a row of what is searched through; keys beside codes are mapped, or copied."""
        keys = self._datastore.meta.row_bytes
        if self.choice.codes is None:
            return keys
        copied = keys if self._datastore.keys.selected else 0
        return self.choice.codes.dim + STATS_BYTES + copied

    def _mapped(self, codes: KeyCodes | StoredCodes) -> Iterator[Chunk]:
        """Chunks that hold no copy of anything: keys and codes are mapped, or given."""
        for first, last in self._datastore.keys.pieces(self.chunk_rows):
            yield Chunk(first, self._datastore.keys[first:last], None, codes[first:last])

    def _runs_and_rows(self, wanted: AnyOf) -> Iterator[Chunk]:
        """Long runs of wanted rows, mapped where they are on the CPU; and the others, gathered."""
        keys, places = self._datastore.keys, []

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
        codes = self.choice.codes
        return None if codes is None else codes[start : start + len(keys)]

    def _read(self, keep: bool) -> Iterator[tuple[int, Tensor]]:
        chunks = ((a, keys) for a, keys, _ in self._datastore.iter_chunks(self.chunk_rows))
        # Chunks that stay must each have memory of their own; others share two buffers.
        return self._on_device(chunks, reuse_buffers=not keep)

    def _on_device(
        self, chunks: Iterator[tuple[int, Tensor]], *, reuse_buffers: bool
    ) -> Iterator[tuple[int, Tensor]]:
        if self._device == getattr(self._datastore, "device", torch.device("cpu")):
            return chunks
        from knnext.index.transfer import prefetch_to_device

        return prefetch_to_device(chunks, self._device, reuse_buffers=reuse_buffers)

    def _norms(self, start: int, keys: Tensor) -> Tensor | None:
        """Squared norms of a chunk: N float32 in all, computed once and kept."""
        if not self._with_norms or self.choice.codes is not None:
            return None
        at = (start, len(keys))
        if at not in self._sqnorms:
            self._sqnorms[at] = key_sqnorms(keys)
        return self._sqnorms[at]


def _pages_read() -> int:
    """So far, by this process, for memory that is mapped from files."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
