"""Measures the rates that a plan wants, in under a minute: ``knnext doctor --rates``.

Others' work on the machine only makes a rate lower, so the best of a few runs is kept. What is
measured is what the commands run: `knn_search`, `encode_keys`, FAISS, files with fsync.
"""

from __future__ import annotations

import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnext.datastore.meta import KEY_DTYPES, installed_version
from knnext.index import faiss_library
from knnext.ops import encode_keys, knn_search, mean_key
from knnext.planning.model_shape import ModelShape
from knnext.planning.rates import Rate, Rates, this_machine
from knnext.planning.words import rate_text
from knnext.say import Say, binary_size

_RUNS = 3
_SECONDS = 1.5  # after which a rate is not measured again
_MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """What is measured on. A disk's file is `disk_bytes`, written no longer than some seconds."""

    dim: int = 1024
    k: int = 1024
    entries: int = 1 << 16
    queries: int = 256
    disk_bytes: int = 256 * _MIB
    memory_bytes: int = 512 * _MIB
    lists: int = 256
    hidden: int = 1024


#: Enough to see that everything runs.
SMALL = Sizes(16, 8, 2048, 32, _MIB, 4 * _MIB, 8, 64)


@dataclass(frozen=True)
class Forward:
    """A pass to time: `run` reads `tokens` tokens in windows of `block`."""

    run: Callable[[], Any]
    tokens: int
    block: int
    shape: ModelShape


def measure(
    sizes: Sizes, say: Say, *, folder: str | Path = ".", forward: Forward | None = None
) -> Rates:
    """All rates of this machine; says each as it is known. ``forward``: of the user's model."""
    machine, device = this_machine(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Rate] = {}
    load = os.getloadavg()[0]  # before our own work adds to it
    for part in (_forward, _disk, _memory, _copy, _search, _codes, _faiss):
        for name, value, how in part(sizes, device, Path(folder), forward):
            found[name] = Rate(value, f"measured: {how}", measured=True)
            say(f"{name:22} {rate_text(name, value):>16}  {how}")
    if load > machine.cores / 2:
        say(f"note: others keep this machine busy (load {load:.1f}); measure again when it is idle")
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Rates(machine, found, now, installed_version())


Found = Iterator[tuple[str, float, str]]


def best(run: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds of the quickest of a few runs; the first one, which warms up, counts if it is all."""
    best, begin = float("inf"), time.perf_counter()
    for number in range(_RUNS + 1):
        start = time.perf_counter()
        run()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        took = max(time.perf_counter() - start, 1e-9)
        best = min(best, took)
        if number and time.perf_counter() - begin > _SECONDS:
            break
    return best


def _states(rows: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Made keys that lie as hidden states do: few directions of much, many of little spread.

    How many rows codes leave open depends on it; with equal spread it is more.
    """
    spread = torch.arange(1, dim + 1, device=device).rsqrt()
    return (3 * _random(rows, dim, device, torch.float32) * spread + 1).to(dtype)


def _random(rows: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, dim, generator=generator, dtype=torch.float32, device=device).to(dtype)


# The parts


def _forward(sizes: Sizes, device: torch.device, _: Path, forward: Forward | None) -> Found:
    timed = forward or _standard_stack(sizes, device)
    seconds = best(timed.run, device)
    flops = timed.tokens * timed.shape.flops(timed.block)
    yield "forward", flops / seconds, f"{timed.shape.name}, {timed.tokens:,} tokens"


def _standard_stack(sizes: Sizes, device: torch.device) -> Forward:
    """Two decoder blocks as most models have them, with numbers that mean nothing."""
    width, heads, tokens = sizes.hidden, max(1, sizes.hidden // 64), 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    windows = 16 if device.type == "cuda" else 1
    shapes = ((3 * width, width), (width, width), (8 * width, width), (width, 4 * width))
    blocks = [
        [_random(*shape, device, dtype) / shape[1] ** 0.5 for shape in shapes] for _ in range(2)
    ]
    start = _random(windows * tokens, width, device, dtype).view(windows, tokens, width)

    def run() -> Tensor:
        x = start
        for into, out, up, down in blocks:
            q, k, v = (x @ into.T).view(windows, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
            read = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + read.transpose(1, 2).reshape(windows, tokens, width) @ out.T
            gate, value = (torch.nn.functional.layer_norm(x, (width,)) @ up.T).chunk(2, dim=-1)
            x = x + (torch.nn.functional.silu(gate) * value) @ down.T
        return x

    numbers = float(sum(weight.numel() for block in blocks for weight in block))
    name = f"a stack of 2 blocks of width {width:,}, {str(dtype).removeprefix('torch.')}"
    shape = ModelShape(name, width, len(blocks), numbers, numbers, width)
    return Forward(run, windows * tokens, tokens, shape)


def _disk(sizes: Sizes, _: torch.device, folder: Path, __: Forward | None) -> Found:
    block = np.random.default_rng(0).bytes(8 * _MIB if sizes.disk_bytes >= 8 * _MIB else 1 << 16)
    with tempfile.TemporaryFile(dir=folder) as file:
        fd, written, start = file.fileno(), 0, time.perf_counter()
        while written < sizes.disk_bytes and time.perf_counter() - start < 4:
            written += os.write(fd, block)
        os.fsync(fd)
        took = time.perf_counter() - start
        yield "disk_write", written / took, f"{binary_size(written)} and fsync in {folder}"
        yield "checksum", len(block) / best(lambda: zlib.crc32(block)), "zlib's CRC-32, one thread"
        cached = _drop(fd, written)
        start = time.perf_counter()
        os.lseek(fd, 0, os.SEEK_SET)
        while os.read(fd, len(block)):
            if time.perf_counter() - start > 4:
                break
        done, took = os.lseek(fd, 0, os.SEEK_CUR), time.perf_counter() - start
        how = "from the page cache, which would not let go" if cached else "page cache dropped"
        yield "disk_read", done / took, f"{binary_size(done)}, {how}"


def _drop(fd: int, size: int) -> bool:
    """Let the page cache forget a file; whether it still has some of it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if not hasattr(os, "RWF_NOWAIT"):
        return False  # nobody can tell
    kept = 0
    for place in range(0, size, max(1, size // 16)):
        try:
            kept += os.preadv(fd, [bytearray(1)], place, os.RWF_NOWAIT) > 0
        except OSError:  # it would have to wait for the disk; or the file system cannot say
            continue
    return kept > 4


def _memory(sizes: Sizes, _: torch.device, __: Path, ___: Forward | None) -> Found:
    numbers = torch.ones(sizes.memory_bytes // 4, dtype=torch.float32, device="cpu")
    rate = numbers.nbytes / best(lambda: numbers.sum())
    yield "memory_read", rate, f"{binary_size(numbers.nbytes)} summed by {_threads()}"


def _copy(sizes: Sizes, device: torch.device, _: Path, __: Forward | None) -> Found:
    if device.type != "cuda":
        return
    numbers = torch.ones(sizes.memory_bytes // 4, dtype=torch.float32, device="cpu").pin_memory()
    target = torch.empty_like(numbers, device=device)
    rate = numbers.nbytes / best(lambda: target.copy_(numbers, non_blocking=True), device)
    yield "host_to_device", rate, f"{binary_size(numbers.nbytes)} of pinned memory"


def _search(sizes: Sizes, device: torch.device, _: Path, __: Forward | None) -> Found:
    for name, dtype in KEY_DTYPES.items():
        keys = _states(sizes.entries, sizes.dim, device, dtype)
        yield from _searched(f".{name}", sizes, keys, keys.nbytes, f"{name} keys", None)


def _codes(sizes: Sizes, _: torch.device, __: Path, ___: Forward | None) -> Found:
    """Codes serve the CPU, also beside a GPU."""
    keys = _states(sizes.entries, sizes.dim, torch.device("cpu"), torch.float16)
    center = mean_key(keys)
    rate = keys.numel() / best(lambda: encode_keys(keys, center))
    yield "encode", rate, f"{_rows(sizes)} float16 keys by {_threads()}"
    codes = encode_keys(keys, center)
    yield from _searched("", sizes, keys, codes.nbytes, "codes", codes, of="codes")


def _searched(
    ending: str, sizes: Sizes, keys: Tensor, read: int, what: str, codes: Any, of: str = "search"
) -> Found:
    # Queries near keys, and none of them equal to one.
    near = keys[torch.arange(sizes.queries, device=keys.device) % len(keys)].float()
    noise = _random(len(near), sizes.dim, keys.device, torch.float32)
    queries = (near + 0.1 * noise).to(keys.dtype)
    k = min(sizes.k, sizes.entries)
    many = best(lambda: knn_search(queries, keys, k, codes=codes), keys.device)
    flops = 2.0 * sizes.queries * keys.numel() / many
    how = f"{_rows(sizes)} {what}, k {k:,}"
    yield f"{of}_flops{ending}", flops, f"{sizes.queries:,} queries in {how}"
    one = best(lambda: knn_search(queries[:1], keys, k, codes=codes), keys.device)
    yield f"{of}_bytes{ending}", read / one, f"a query in {how}"


def _faiss(sizes: Sizes, _: torch.device, __: Path, ___: Forward | None) -> Found:
    try:
        faiss_library.load()
    except ImportError:
        return
    lists = sizes.lists
    rows = min(sizes.entries, 64 * lists)
    keys = faiss_library.as_float32(
        _random(sizes.entries, sizes.dim, torch.device("cpu"), torch.float32)
    )
    flat = faiss_library.create(f"IVF{lists},Flat", sizes.dim, "l2")
    trained = _once(lambda: faiss_library.train(flat, keys[:rows], f"IVF{lists},Flat"))
    how = f"{rows:,} rows of {sizes.dim:,} into {lists:,} lists"
    yield "faiss_train", 2.0 * 10 * rows * lists * sizes.dim / trained, how
    factory = f"IVF{lists},PQ{max(1, sizes.dim // 16)}"
    with _few_points_allowed():
        index = faiss_library.create(factory, sizes.dim, "l2")
        _quick(index)
        faiss_library.train(index, keys[: max(rows, 256)], factory)
    added = _once(lambda: faiss_library.add(index, keys))
    flops = 2.0 * sizes.entries * sizes.dim * (lists + 256)
    yield "faiss_add", flops / added, f"{_rows(sizes)} rows, {factory}"
    faiss_library.set_nprobe(index, lists)
    queries = keys[: min(64, sizes.queries)]
    seconds = best(lambda: faiss_library.search(index, queries, min(sizes.k, 1024)))
    scanned = len(queries) * sizes.entries * max(1, sizes.dim // 16)
    yield "faiss_scan", scanned / seconds, f"{len(queries)} queries through {factory}, all lists"


def _quick(index: Any) -> None:
    """How well codes fit is not what is measured: few rounds of k-means do."""
    ivf = faiss_library.load().downcast_index(faiss_library.ivf_of(index))
    ivf.cp.niter = 1
    ivf.pq.cp.niter = 1
    ivf.pq.cp.max_points_per_centroid = 16


@contextmanager
def _few_points_allowed() -> Iterator[None]:
    """FAISS warns of few training rows on the process's own stderr."""
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return max(time.perf_counter() - start, 1e-9)


# Words


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


def _rows(sizes: Sizes) -> str:
    return f"{sizes.entries:,} x {sizes.dim:,}"
