"""Errors that mean "out of memory", whoever raises them, in one sentence."""

from __future__ import annotations

import errno
import re

from knnext.say import binary_size

_WORDS = (
    *("can't allocate memory", "cannot allocate memory", "failed to map segment", "bad_alloc"),
    *("out of memory", "unable to allocate", "can't start new thread", "mmap failed"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """torch, numpy, FAISS, the loader and the kernel each have words of their own for it."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | ImportError) and any(word in text for word in _WORDS)


def out_of_memory(text: str) -> str:
    """What ran out and, where the shell has set a limit, that it did."""
    asked = re.search(r"([0-9]+) bytes", text)
    size = f" (asked for {binary_size(int(asked[1]))})" if asked else f" ({text})" if text else ""
    limit = _limit()
    if limit is not None:
        return (
            f"out of memory{size}: this process may use {binary_size(limit)} of address space "
            "(ulimit -v); models and datastores are mapped and need more"
        )
    return f"out of memory{size}"


def _limit() -> int | None:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft
