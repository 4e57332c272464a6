"""The kernels behind codes, built apart, and what they say of pairs and rows.

No op shows what its first pass makes: code_bounds.cpp does. Kernels of processors with AVX-VNNI and
AVX-512 are compiled against an emulation (emulated_vnni.h), so that all paths are held wherever
AVX2 is.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from knnext import _host, reference

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CXX = os.environ.get("CXX", "g++")
PATHS = ["plain", "avx2", "avx2_vnni", "avx512", "avx512_vnni"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
EMULATED = [*AVX2, "-Wno-psabi", "-include", str(Path(__file__).with_name("emulated_vnni.h"))]
CODES = "cpu/codes/"
FLAGS = {
    "cpu/isa": [],
    "cpu/search/bound": [],
    "cpu/search/candidates": [],
    "cpu/search/tile_plain": [],
    "cpu/search/tile_avx2": AVX2,
    **{CODES + name: [] for name in ("bound", "encoder", "rotation", "loops_plain")},
    CODES + "loops_avx2": AVX2,
    **{CODES + "loops_" + path: EMULATED for path in PATHS[2:]},
}

#: Of tests that have the library built.
NEEDS = [
    pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles x86's vector paths"),
]


def own_paths() -> list[str]:
    """Those that this processor can run, emulated ones among them."""
    return PATHS if "avx2" in _host.usable_cpu_isas() else PATHS[:1]


def compiled(source: Path, to: Path, flags: list[str], level: str = "-O1") -> str:
    command = [CXX, "-std=c++20", level, "-fPIC", f"-I{CSRC}", *flags, "-c", str(source)]
    subprocess.run([*command, "-o", str(to)], check=True)
    return str(to)


def compiled_all(folder: Path) -> dict[str, str]:
    """The object files by name; `linked` makes a library of them."""
    made = {
        name: compiled(CSRC / f"{name}.cpp", folder / f"{name.replace('/', '_')}.o", flags)
        for name, flags in FLAGS.items()
    }
    driver = Path(__file__).with_name("code_bounds.cpp")
    return {**made, "driver": compiled(driver, folder / "driver.o", [])}


def linked(objects: dict[str, str], to: Path) -> ctypes.CDLL:
    subprocess.run([CXX, "-shared", *objects.values(), "-o", str(to)], check=True)
    return ctypes.CDLL(str(to))


def run(function: Callable[..., int], *arguments: int | Tensor) -> int:
    return function(
        *(
            ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int64(x)
            for x in arguments
        )
    )


class Said(NamedTuple):
    """All (Q, N): what the search computes, what codes say, whether the pair was listed under the
    threshold just above its distance; and the most that may be said: what codes say in exact
    arithmetic, less the roundings of the search."""

    distances: Tensor
    bounds: Tensor
    listed: Tensor
    ideal: Tensor
    most: Tensor

    def violations(self) -> int:
        """Pairs of which too much is said, or that were not listed."""
        found = self.distances.isfinite() & ~self.of_closed_queries()[:, None]
        too_high = (self.bounds > self.distances) | (self.bounds.double() > self.most)
        return int((too_high | ~self.listed)[found].sum())

    def of_closed_queries(self) -> Tensor:
        return self.bounds.isnan().all(1) & ~self.listed.any(1)


def said(
    library: ctypes.CDLL,
    path: str,
    queries: Tensor,
    keys: Tensor,
    center: Tensor,
    metric: str = "l2",
    refined: bool = False,
    flush: bool = False,
) -> Said:
    queries, keys = queries.float().contiguous(), keys.float().contiguous()
    rows, count = queries.shape[0], keys.shape[0]
    distances, bounds = torch.zeros(rows, count), torch.zeros(rows, count)
    listed, ideal = torch.zeros(rows, count, dtype=torch.bool), torch.zeros(rows, count).double()
    run(
        library.code_bounds,
        *(PATHS.index(path), int(metric == "ip"), int(refined), int(flush), queries.shape[1]),
        *(center.float().contiguous(), rows, queries, count, keys),
        *(distances, bounds, listed, ideal),
    )
    lost = roundings(queries.double(), keys.double(), metric, refined, ideal)
    # Of a key that no code bounds, what every distance is above.
    most = (ideal - lost).clamp_min(0 if metric == "l2" else torch.finfo(torch.float32).min)
    return Said(distances, bounds, listed, ideal, most)


def gamma(roundings: float) -> float:
    return roundings * 2.0**-24 / (1 - roundings * 2.0**-24)


def roundings(
    queries: Tensor, keys: Tensor, metric: str, refined: bool, distances: Tensor
) -> Tensor:
    """(Q, N): how far below the truth the search's own arithmetic may come, by the derivations in
    csrc/cpu/search/bound.cpp."""
    dim = queries.shape[1]
    expanded = gamma(min(dim, 128) + (dim + 127) // 128 - 1)
    direct = gamma(dim / 16 + 6)
    if metric == "l2" and refined:
        return direct * distances
    q, x = queries.square().sum(1)[:, None], keys.square().sum(1)
    if metric == "l2":
        return (2 * expanded + 3 * 2.0**-24) * (q + x)
    return (direct if refined else expanded) * q.sqrt() * x.sqrt()


def mean(rows: Tensor) -> Tensor:
    return torch.where(rows.isfinite(), rows, 0).double().mean(0).float()


# Pairs and rows that lie at the bound


def back(rotated: Tensor) -> Tensor:
    """The rows that reference.rotate() turns into these, in float64."""
    dim = rotated.shape[1]
    return rotated @ reference.rotate(torch.eye(dim, dtype=torch.float64)).T


def planted(limit: int, dim: int, metric: str) -> tuple[Tensor, Tensor]:
    """A query and a key whose coding errors, near half a step everywhere, all point toward each
    other, so that their distance is what the triangle inequality leaves. The first dimension holds
    the largest element of both, which sets the scale."""
    way = torch.randint(0, 2, (dim,)).double() * 2 - 1
    base = torch.randint(-1, 2, (dim,)).double()
    key_step, query_step = 1.0, 127 / limit
    if metric == "l2":
        key, query = base + 0.49 * way, base + 2 * way
        toward = -0.49
    else:  # all along one line: the largest product that the codes allow
        key, query = 100 * way + 0.49 * way, 100 * way
        toward = 0.49
    query = (query / query_step).round() * query_step + toward * query_step * way
    for row in (key, query):
        row[0] = 127 * key_step
    return query[None], key[None]


def planted_rows(library: ctypes.CDLL, path: str, metric: str) -> tuple[Tensor, Tensor]:
    """(3, 1024) queries and as many keys, of which each pair lies at the bound of a path."""
    queries, keys = zip(
        *(
            planted(run(library.code_query_limit, PATHS.index(path), 1024), 1024, metric)
            for _ in range(3)
        ),
        strict=True,
    )
    return back(torch.cat(queries)).float(), back(torch.cat(keys)).float()


def coded(rows: int, dim: int) -> Tensor:
    """Rows that codes meet: what is left is the error of the rotation alone."""
    codes = torch.randint(-127, 128, (rows, dim)).double()
    codes[:, 0] = 127
    return back(codes / 64)


def errors_too_small(library: ctypes.CDLL, rows: Tensor, center: Tensor, flush: bool) -> int:
    """Rows whose stored error is below the true one, or below the roundings of the transforms."""
    rows, center = rows.float().contiguous(), center.float()
    codes, stats = torch.zeros(rows.shape, dtype=torch.int8), torch.zeros(len(rows), 3)
    run(library.code_rows, rows.shape[1], center, len(rows), rows, int(flush), codes, stats)
    exact = reference.rotate(rows.double() - center.double())
    scale, error, norm = stats.double().T
    off = (exact - scale[:, None] * codes.double()).square().sum(1).sqrt()
    restored = scale * codes.double().square().sum(1).sqrt()
    assert torch.allclose(norm, restored, rtol=1e-7, atol=0)
    # Each step of the transforms rounds, as do factors and the difference: also what happened to be
    # rounded well.
    steps = 2 * (rows.shape[1].bit_length() - 1) + 5
    return int((error < off.maximum(steps * 2.0**-24 * exact.square().sum(1).sqrt())).sum())
