"""Ranges of one file that several processes write at once, and the checksum of the whole."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from knnext.datastore.files import BLOCK_BYTES


class FileRange:
    """A range of a file that others write at other ranges of; grows, with the CRC-32 of its bytes.

    ``length`` is what counts. The file itself is never cut: it is not this range's alone.
    """

    def __init__(self, path: Path, begin: int, length: int = 0, crc: int = 0) -> None:
        self.path, self.begin = path, begin
        self.length, self.crc = length, crc
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)

    def append(self, data: memoryview) -> None:
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            self.crc = zlib.crc32(block, self.crc)
            while len(block):
                written = os.pwrite(self._file.fileno(), block, self.begin + self.length)
                self.length += written
                block = block[written:]

    def content_crc(self) -> int:
        """Of what the file holds in this range now."""
        crc, done = 0, 0
        while done < self.length:
            wanted = min(BLOCK_BYTES, self.length - done)
            block = os.pread(self._file.fileno(), wanted, self.begin + done)
            if not block:
                break
            crc, done = zlib.crc32(block, crc), done + len(block)
        return crc if done == self.length else -1

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def combine_crc32(first: int, second: int, num_bytes: int) -> int:
    """The CRC-32 of two pieces, one after the other, from that of each; the second's length.

    A zero bit behind a piece is a linear map of its 32 bits; its powers of two make any length.
    """
    power = [0xEDB88320, *(1 << bit for bit in range(31))]  # one zero bit
    left, crc = 8 * num_bytes, first
    while left:
        if left & 1:
            crc = _times(power, crc)
        power = [_times(power, column) for column in power]
        left >>= 1
    return crc ^ second


def _times(columns: Sequence[int], vector: int) -> int:
    found, bit = 0, 0
    while vector:
        if vector & 1:
            found ^= columns[bit]
        vector >>= 1
        bit += 1
    return found
