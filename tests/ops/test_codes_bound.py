"""What codes say of a distance holds: never above what the search computes, and not far below it.

The kernels are compiled apart (code_bounds.cpp), since no op shows what its first pass makes; those
of processors with AVX-VNNI and AVX-512 against an emulation (emulated_vnni.h), so that all paths
are held wherever AVX2 is. Mutations of the sources show that each margin is needed and seen.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from knnext import _host, reference
from tests.ops.test_knn_search_refine import CLOUDS

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
DIMS = [1, 2, 3, 7, 64, 65, 129, 576, 1600, 4096]
INF = float("inf")

pytestmark = [
    pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles x86's vector paths"),
]


def own_paths() -> list[str]:
    return PATHS if "avx2" in _host.usable_cpu_isas() else PATHS[:1]


def compiled(source: Path, to: Path, flags: list[str], level: str = "-O1") -> str:
    command = [CXX, "-std=c++20", level, "-fPIC", f"-I{CSRC}", *flags, "-c", str(source)]
    subprocess.run([*command, "-o", str(to)], check=True)
    return str(to)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("codes")
    made = {
        name: compiled(CSRC / f"{name}.cpp", folder / f"{name.replace('/', '_')}.o", flags)
        for name, flags in FLAGS.items()
    }
    driver = Path(__file__).with_name("code_bounds.cpp")
    return {**made, "driver": compiled(driver, folder / "driver.o", [])}


def linked(objects: dict[str, str], to: Path) -> ctypes.CDLL:
    subprocess.run([CXX, "-shared", *objects.values(), "-o", str(to)], check=True)
    return ctypes.CDLL(str(to))


@pytest.fixture(scope="module")
def library(objects: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return linked(objects, tmp_path_factory.mktemp("linked") / "codes.so")


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


def outlier(rows: int, dim: int) -> Tensor:
    keys = torch.randn(rows, dim)
    keys[rows // 2] *= 1e6
    return keys


def at_the_center(rows: int, dim: int) -> Tensor:
    return torch.randn(1, dim).repeat(rows, 1) * (1 + (torch.rand(rows, 1) < 0.5) * 2.0**-22)


ROWS = {
    **CLOUDS,
    "largest half": lambda n, d: (torch.randint(0, 2, (n, d)) * 2.0 - 1) * 65504,
    "one huge key": outlier,
    "at the center": at_the_center,
    "one huge dimension": lambda n, d: torch.randn(n, d) + 1e4 * torch.eye(1, d),
    "zero": lambda n, d: torch.zeros(n, d),
    "not finite": lambda n, d: torch.randn(n, d).masked_fill(torch.rand(n, d) < 0.02, INF),
}
FORMS = [("l2", False), ("l2", True), ("ip", False), ("ip", True)]


@pytest.mark.parametrize("name", ROWS)
def test_no_key_is_turned_away_that_lies_below_the_threshold(
    library: ctypes.CDLL, name: str
) -> None:
    for dim in DIMS:
        queries, keys = ROWS[name](3, dim), ROWS[name](50 if dim < 1000 else 17, dim)
        keys[:3] = queries
        for center in (mean(keys), torch.zeros(dim), keys[7].nan_to_num(posinf=0) * 3):
            for metric, refined in FORMS:
                for path in own_paths():
                    got = said(library, path, queries, keys, center, metric, refined)
                    assert got.violations() == 0, f"{path}, {metric}, {refined}, D = {dim}"
                if dim > 1000:
                    break  # one form is enough of what takes longest


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dim", [3, 64, 576])
def test_a_million_random_pairs(library: ctypes.CDLL, path: str, dim: int) -> None:
    """Below what the search computes, and as tight as exact arithmetic would be."""
    if path not in own_paths():
        pytest.skip("no AVX2")
    rows, count = (100, 4000) if dim < 100 and "512" not in path else (30, 1500)
    keys = torch.randn(count, dim) * torch.rand(count, 1) + 3
    queries = keys[:rows] + 0.3 * torch.randn(rows, dim) * torch.rand(rows, 1)
    center = mean(keys)
    got = said(library, path, queries, keys, center)
    assert got.violations() == 0 and got.listed.all()
    exact = torch.cdist(queries.double(), keys.double()).square()
    assert (got.ideal <= exact * (1 + 1e-9)).all()
    scale = queries.double().square().sum(1)[:, None] + keys.double().square().sum(1)
    lost = got.ideal - got.bounds.double()
    # Margins of errors, 2^-10 of each, and of rounding, 2^-18 of the coded norms.
    assert (lost <= 0.01 * got.ideal + 6e-5 * scale).all()
    close = exact < 0.3 * exact.median()
    assert (got.bounds.double()[~close] > 0.8 * exact[~close]).all()  # of use at all
    for metric, refined in FORMS[1:]:
        part = said(library, path, queries[:20], keys, center, metric, refined)
        assert part.violations() == 0 and part.listed.all()


# Pairs that lie at the bound


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
    queries, keys = zip(
        *(
            planted(run(library.code_query_limit, PATHS.index(path), 1024), 1024, metric)
            for _ in range(3)
        ),
        strict=True,
    )
    return back(torch.cat(queries)).float(), back(torch.cat(keys)).float()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("path", PATHS)
def test_pairs_at_the_bound(library: ctypes.CDLL, path: str, metric: str) -> None:
    if path not in own_paths():
        pytest.skip("no AVX2")
    queries, keys = planted_rows(library, path, metric)
    got = said(library, path, queries, keys, torch.zeros(1024), metric, True)
    assert got.violations() == 0 and got.listed.all()
    at, bound = got.distances.diagonal(), got.bounds.diagonal()
    # Within half a percent of what codes leave open: less than a step of the error of either.
    assert (at - bound <= 0.005 * at.abs()).all()


# What is counted in whole numbers


@pytest.mark.parametrize("path", PATHS)
def test_products_are_exact(library: ctypes.CDLL, path: str) -> None:
    if path not in own_paths():
        pytest.skip("no AVX2")
    number = PATHS.index(path)
    for dim in (1, 2, 3, 4, 5, 31, 33, 63, 64, 65, 127, 129, 576):
        limit = run(library.code_query_limit, number, dim)
        for few in (0, 1):
            most = 4 if few else {"plain": 4, "avx2": 6, "avx2_vnni": 6}.get(path, 8)
            for rows in range(1, most + 1):
                queries = torch.randint(-limit, limit + 1, (rows, dim)).short()
                queries[-1] = limit
                keys = torch.randint(-127, 128, (50, dim)).char()
                keys[0], keys[1] = 127, -127
                held = torch.cat([keys, torch.full((64, dim), 99).char()])
                out = torch.zeros(rows, 50, dtype=torch.int32)
                run(library.code_products, number, few, dim, rows, queries, 50, held, out)
                assert torch.equal(out.long(), queries.long() @ keys.long().T), (dim, few, rows)


@pytest.mark.parametrize("path", PATHS[1:])
def test_transforms_have_the_same_bits_on_every_path(library: ctypes.CDLL, path: str) -> None:
    if path not in own_paths():
        pytest.skip("no AVX2")
    for dim in (1 << n for n in range(14)):
        row = torch.randn(dim)
        other = row.clone()
        run(library.code_hadamard, 0, row, dim)
        run(library.code_hadamard, PATHS.index(path), other, dim)
        assert torch.equal(row, other)


# Errors of rows


def subnormal(rows: int, dim: int) -> Tensor:
    return torch.randn(rows, dim) * 2.0 ** -torch.randint(98, 149, (rows, 1)).double()


def coded(rows: int, dim: int) -> Tensor:
    """Rows that codes meet: what is left is the error of the rotation alone."""
    codes = torch.randint(-127, 128, (rows, dim)).double()
    codes[:, 0] = 127
    return back(codes / 64)


def errors_too_small(library: ctypes.CDLL, rows: Tensor, center: Tensor, flush: bool) -> int:
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


@pytest.mark.parametrize("dim", [d for d in DIMS if d <= 1600])
@pytest.mark.parametrize("flush", [False, True])
def test_errors_of_rows_also_where_subnormals_are_flushed(
    library: ctypes.CDLL, dim: int, flush: bool
) -> None:
    for make in (subnormal, coded, *ROWS.values()):
        rows = make(200, dim).float()
        rows = rows[rows.isfinite().all(1)]
        if not len(rows):
            continue
        for center in (torch.zeros(dim), mean(rows)):
            assert errors_too_small(library, rows, center, flush) == 0, make


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dim", [1, 7, 64, 576])
def test_bounds_hold_where_subnormals_are_flushed(
    library: ctypes.CDLL, dim: int, metric: str
) -> None:
    keys = subnormal(90, dim).float()
    keys[::3] *= 2.0**40
    for refined in (False, True):
        for path in own_paths()[:2]:
            got = said(library, path, keys[:9], keys, mean(keys), metric, refined, flush=True)
            assert got.violations() == 0, path


# Mutations: each makes the bound a little too high, and is seen


def planted_violations(library: ctypes.CDLL, metric: str) -> int:
    count = 0
    for path in ("plain", "avx2"):
        queries, keys = planted_rows(library, path, metric)
        got = said(library, path, queries, keys, torch.zeros(1024), metric, True)
        count += got.violations()
    return count


def large_norms(library: ctypes.CDLL) -> int:
    """Pairs at the bound, of the largest norms that their codes can have."""
    dim = 1024
    way = torch.randint(0, 2, (8, dim)).double() * 2 - 1
    key, query = 126 * way - 0.49 * way, 124 * way
    step = 127 / run(library.code_query_limit, 0, dim)
    query = (query / step).round() * step + 0.49 * step * way
    key[:, 0] = query[:, 0] = 127
    got = said(library, "plain", back(query), back(key), torch.zeros(dim), "l2", True)
    return got.violations()


def far(library: ctypes.CDLL, metric: str) -> int:
    """Far from the origin; products with the center, whose own margin is wide, are small."""
    keys = 100 + torch.randn(400, 64)
    queries = keys[:40] * (torch.tensor([1.0, -1.0]).repeat(32) if metric == "ip" else 1)
    return said(library, "plain", queries, keys, mean(keys), metric).violations()


def of_rows(library: ctypes.CDLL, flush: bool) -> int:
    # At 2^-121 the first factor of a transform takes every element of 4096 below 2^-126.
    rows = 2.0**-121 * torch.randn(100, 4096) if flush else coded(100, 1024)
    return errors_too_small(library, rows, torch.zeros(rows.shape[1]), flush)


#: Where a bound that is too high is seen; each counts what it sees.
SCENES: dict[str, Callable[[ctypes.CDLL], int]] = {
    "at the bound": lambda library: planted_violations(library, "l2"),
    "at the bound, ip": lambda library: planted_violations(library, "ip"),
    "large norms": large_norms,
    "far": lambda library: far(library, "l2"),
    "far, ip": lambda library: far(library, "ip"),
    "rotation": lambda library: of_rows(library, False),
    "subnormals": lambda library: of_rows(library, True),
}


#: (file, what stands there, what is put in its place, where that is seen)
MUTATIONS: list[tuple[str, str, str, str]] = [
    ("encoder", "error * (1 + 0x1p-20)", "error * 0.99", "at the bound"),
    ("bound", "kErrorMargin = 1 + 0x1p-10", "kErrorMargin = 1 - 0x1p-8", "at the bound"),
    ("bound", "kErrorMargin = 1 + 0x1p-10", "kErrorMargin = 0.99", "at the bound, ip"),
    ("bound", "query.error = up(stats.error", "query.error = up(0 * stats.error", "at the bound"),
    ("bound", "stats[i].error * static_cast<float>(kErrorMargin)", "0.0f", "at the bound"),
    ("bound", "stats[i].error * static_cast<float>(kErrorMargin)", "0.0f", "at the bound, ip"),
    ("bound", "up(query.error + query.own_reach", "up(query.own_reach", "at the bound, ip"),
    ("bound", "up(stats.norm * kErrorMargin)", "0.99f * stats.norm", "at the bound, ip"),
    ("bound", "kNormMargin = 1 - 0x1p-18", "kNormMargin = 1 + 0x1p-18", "large norms"),
    ("bound", "up(squares * rounding_ + floor_)", "up(floor_)", "far"),
    ("bound", "(reach + center_norm_)", "reach", "far"),
    ("bound", "expanded + direct + 64 * kUnit", "0", "far, ip"),
    ("bound", "(root + query.error) * kRootMargin", "root * kRootMargin", "at the bound"),
    ("bound", "-up(2 * u)", "-up(1.98 * u)", "at the bound"),
    ("rotation", "return 2 * (log2_of(width_) + 4) * 0x1p-24", "return 0", "rotation"),
    ("rotation", "return 8 * (std::sqrt(width) + 1)", "return (32 + 0 * width)", "subnormals"),
    ("loops_plain", "kHigh = 1 + 0x1p-20f", "kHigh = 1 - 0x1p-8f", "at the bound"),
    ("loops_plain", "kLow = 1 - 0x1p-20f", "kLow = 1 + 0x1p-8f", "at the bound"),
]  # fmt: skip


def mutated(objects: dict[str, str], folder: Path, file: str, old: str, new: str) -> ctypes.CDLL:
    """The library with one file's text changed; loops.h is a text of loops_plain.cpp."""
    text = (CSRC / CODES / f"{file}.cpp").read_text()
    loops = (CSRC / CODES / "loops.h").read_text()
    text = text.replace('#include "cpu/codes/loops.h"', loops.replace("#pragma once", ""))
    assert text.count(old) == 1, f"{file} no longer says {old}"
    source = folder / "mutated.cpp"
    source.write_text(text.replace(old, new))
    level = "-O1" if file == "loops_plain" else "-O0"
    made = compiled(source, folder / "mutated.o", ["-Wno-unused"], level)
    return linked({**objects, CODES + file: made}, folder / "mutated.so")


def test_all_is_well_before_a_mutation(library: ctypes.CDLL) -> None:
    assert not any(scene(library) for scene in SCENES.values())


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: re.sub(r"\W+", "_", f"{m[0]} {m[2]}"))
def test_a_bound_a_little_too_high_is_seen(
    objects: dict[str, str], tmp_path: Path, mutation: tuple[str, str, str, str]
) -> None:
    file, old, new, where = mutation
    assert SCENES[where](mutated(objects, tmp_path, file, old, new)) > 0
