"""Rows that grow with the text: in memory while they are few, in a file of no name where not.

A text of 300,000 tokens has 2.4 GB of neighbors. They are written once and then read in order,
once a temperature, so they lie in a temporary file that is mapped: an ordinary tensor for whoever
looks at some of them, and for whoever goes through all of them no memory beyond a piece, since
`release` hands back what was read. The file has no name and ends with the tensor.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from knnext.errors import NoRoomError
from knnext.say import binary_size

#: Arrays of at most so many bytes stay in memory.
MEMORY_BYTES = 32 << 20
_PIECE_BYTES = 16 << 20

#: The mapping behind a tensor, by the address where it begins; a view of it begins there too.
_mapped: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()


def empty_rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """(rows, width) on the CPU, not filled, wherever there is room for it.

    OSError that says how much is wanted, where the disk of `spill_folder` has not the room.
    """
    size = rows * width * dtype.itemsize
    if size <= MEMORY_BYTES:
        return torch.empty(rows, width, dtype=dtype, device="cpu")
    buffer = _map(size)
    tensor = torch.frombuffer(buffer, dtype=dtype).view(rows, width)
    _mapped[tensor.data_ptr()] = buffer
    return tensor


def spill_folder() -> Path:
    """Where they are made: TMPDIR where it is set, else /var/tmp, which is never in memory."""
    usual = Path("/var/tmp")
    if not os.environ.get("TMPDIR") and os.access(usual, os.W_OK | os.X_OK):
        return usual
    return Path(tempfile.gettempdir())


def row_pieces(rows: int, row_bytes: int) -> Iterator[slice]:
    """Runs of rows, in order, of some megabytes each."""
    step = max(1, _PIECE_BYTES // max(1, row_bytes))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def release(*tensors: Tensor | None) -> None:
    """Give back the memory through which a mapped tensor was read or written; its rows stay."""
    for tensor in tensors:
        buffer = None if tensor is None else _mapped.get(tensor.untyped_storage().data_ptr())
        if buffer is not None:
            buffer.madvise(mmap.MADV_DONTNEED)


def _map(size: int) -> mmap.mmap:
    """A shared mapping of a fresh file: what is written goes to the file and not to swap."""
    folder = spill_folder()
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if hasattr(os, "posix_fallocate"):
                # A disk without room says so here, and not as a bus error at some later row.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                os.ftruncate(file.fileno(), size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise NoRoomError(
                errno.ENOSPC,
                f"the neighbors of this text want {binary_size(size)} on the disk of {folder}: set "
                "TMPDIR to a folder with more room, or take fewer neighbors or tokens",
            ) from error
        return mmap.mmap(file.fileno(), size)
