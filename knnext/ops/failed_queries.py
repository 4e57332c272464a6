"""Monitoring of knn_search on CUDA."""

from __future__ import annotations

import ctypes

import torch

from knnext.ops._library import LIBRARIES, REPORT


def failed_queries(device: torch.device | str | int | None = None) -> int:
    """How many queries of :func:`knnext.knn_search` have left the fast path on a CUDA device.

    The search guesses a threshold for each query from a sample of the keys, verifies on the device
    that its guess lost nothing, and sends the queries where it may have through a slower path; the
    results are the same. About one query in 10^8 is expected there. A count that grows with the
    searches means that they are slower than need be, as with thousands of equal keys at the k-th
    place.

    Args:
        device: a CUDA device; the current one by default.

    Returns:
        The count since the library was loaded; a query counts once for each 2^24 keys searched.
        Waits for the device.

    Raises:
        RuntimeError: without a CUDA device, or without the compiled CUDA library.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("failed_queries: torch sees no CUDA device")
    if REPORT.cuda:
        raise RuntimeError(f"failed_queries: {REPORT.cuda}")
    count = ctypes.CDLL(str(LIBRARIES / "libknnext_cuda.so")).knnext_failed_queries
    count.argtypes, count.restype = [ctypes.c_int], ctypes.c_longlong
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        found = int(count(torch.cuda.current_device()))
    if found < 0:
        raise RuntimeError("failed_queries: the CUDA library could not read its counter")
    return found
