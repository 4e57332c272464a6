"""The bound of the expanded form holds: what it says of a pair is never above the direct form.

The kernels are compiled apart (lower_bounds.cpp), since no op shows what its first pass computes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from knnext import _host
from tests.ops.test_knn_search_refine import CLOUDS, misplaced

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CXX = os.environ.get("CXX", "g++")
PATHS = ["plain", "avx2", "avx512"]
FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
UNIT = Fraction(1, 1 << 24)
DIMS = [1, 2, 7, 65, 129, 576, 1600, 4096]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles x86's vector paths"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("bounds")
    files = ["search/bound", "search/candidates", "isa", *(f"search/tile_{p}" for p in PATHS)]
    sources = [CSRC / f"cpu/{name}.cpp" for name in files]
    objects = []
    for source in [*sources, Path(__file__).with_name("lower_bounds.cpp")]:
        flags = FLAGS.get(source.stem.removeprefix("tile_"), [])
        objects.append(str(folder / f"{source.stem}.o"))
        command = [CXX, "-std=c++20", "-O1", "-fPIC", f"-I{CSRC}", *flags, "-c", str(source)]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    built = folder / "bounds.so"
    subprocess.run([CXX, "-shared", *objects, "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


def bounds_of(
    library: ctypes.CDLL, queries: Tensor, keys: Tensor, metric: str, path: str
) -> tuple[Tensor, Tensor]:
    """(Q, N) lower bounds and (Q, N) direct distances."""
    queries, keys = queries.float().contiguous(), keys.float().contiguous()
    shape = (queries.shape[0], keys.shape[0])
    bounds, direct = torch.zeros(shape), torch.zeros(shape)
    sizes = (queries.shape[1], shape[0], queries, shape[1], keys, bounds, direct)
    library.lower_bounds(
        PATHS.index(path),
        int(metric == "ip"),
        *(
            ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int64(x)
            for x in sizes
        ),
    )
    return bounds, direct


def sweep_bounds_of(
    library: ctypes.CDLL,
    queries: Tensor,
    keys: Tensor,
    given: Tensor | None,
    metric: str,
    path: str,
) -> tuple[Tensor, Tensor]:
    """(Q, N) lower bounds of a sweep, and (Q, N) distances by the expanded form, inf where none."""
    queries, keys = queries.float().contiguous(), keys.float().contiguous()
    shape = (queries.shape[0], keys.shape[0])
    bounds, expanded = torch.zeros(shape), torch.zeros(shape)
    of = {name: ctypes.c_void_p(x.data_ptr()) for name, x in (("q", queries), ("k", keys))}
    library.sweep_bounds(
        PATHS.index(path),
        int(metric == "ip"),
        ctypes.c_int64(queries.shape[1]),
        ctypes.c_int64(shape[0]),
        of["q"],
        ctypes.c_int64(shape[1]),
        of["k"],
        ctypes.c_void_p(None if given is None else given.data_ptr()),
        ctypes.c_void_p(bounds.data_ptr()),
        ctypes.c_void_p(expanded.data_ptr()),
    )
    return bounds, expanded


def own_paths() -> list[str]:
    return [path for path in PATHS if path in _host.usable_cpu_isas()]


def largest_half(rows: int, dim: int) -> Tensor:
    return (torch.randint(0, 2, (rows, dim)) * 2.0 - 1) * 65504


def near_pairs(rows: int, dim: int) -> Tensor:
    """Rows that differ in their last bits alone, in every dimension."""
    return torch.randn(1, dim).repeat(rows, 1) * (1 + torch.randint(-2, 3, (rows, dim)) * 2.0**-22)


ROWS = {**CLOUDS, "largest half": largest_half, "near pairs": near_pairs}


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("name", ROWS)
def test_never_above_the_direct_form(library: ctypes.CDLL, name: str, metric: str) -> None:
    for dim in DIMS:
        queries, keys = ROWS[name](6, dim), ROWS[name](90, dim)
        keys[:6] = queries
        for path in own_paths():
            bounds, direct = bounds_of(library, queries, keys, metric, path)
            real = direct.isfinite()
            assert (bounds[real] <= direct[real]).all(), f"{path}, D = {dim}"
            if metric == "l2":
                true = torch.cdist(queries.double(), keys.double(), p=2).square()
                scale = queries.double().square().sum(1)[:, None] + keys.double().square().sum(1)
                said = (bounds > 0) & real & (scale < 1e37)
                # Not so low as to say nothing either: within its own width of the truth.
                width = 4e-5 * max(1.0, dim / 1024) * scale + 1e-30
                assert (bounds.double() >= true - 2 * width)[said].all(), f"{path}, D = {dim}"


def gamma(n: int) -> Fraction:
    return n * UNIT / (1 - n * UNIT)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dim", DIMS[1:])
def test_as_wide_as_the_roundings_ask(library: ctypes.CDLL, dim: int, metric: str) -> None:
    """Of unit vectors at right angles nothing is rounded: what is missing from 2 is the bound's."""
    expanded = gamma(max(min(dim, 128), 32) + (dim + 127) // 128 - 1)
    direct = gamma(dim // 16 + 12)
    for path in own_paths():
        ((bound,),), _ = bounds_of(
            library, torch.eye(2, dim)[:1], torch.eye(2, dim)[1:], metric, path
        )
        if metric == "l2":
            assert 1 - Fraction(float(bound)) / 2 >= 2 * expanded + 2 * direct + 5 * UNIT
        else:
            assert -Fraction(float(bound)) >= expanded + direct + 4 * UNIT


def test_rows_that_take_a_third_of_the_bound(library: ctypes.CDLL) -> None:
    query, keys = misplaced()
    nearest = keys[-1:]
    for path in own_paths():
        bounds, direct = bounds_of(library, query, nearest, "l2", path)
        assert 0 <= float(bounds) <= float(direct)


@pytest.mark.parametrize("given", ["no norms", "true norms", "any norms"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("name", ROWS)
def test_a_sweep_is_never_above_the_expanded_form(
    library: ctypes.CDLL, name: str, metric: str, given: str
) -> None:
    for dim in DIMS:
        queries, keys = ROWS[name](4, dim), ROWS[name](70, dim)
        keys[:4] = queries
        norms = keys.square().sum(1)
        if given == "any norms":
            norms *= torch.randn(70) * 10.0 ** torch.randint(-4, 5, (70,)).float()
        for path in own_paths():
            bounds, expanded = sweep_bounds_of(
                library, queries, keys, None if given == "no norms" else norms, metric, path
            )
            assert (bounds <= expanded).all(), f"{path}, D = {dim}"


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dim", DIMS[1:])
def test_a_sweep_is_as_wide_as_the_roundings_ask(
    library: ctypes.CDLL, dim: int, metric: str
) -> None:
    expanded = gamma(max(min(dim, 128), 32) + (dim + 127) // 128 - 1)
    swept = gamma(dim // 16 + 12)
    one, other = torch.eye(2, dim)
    for given in (None, torch.ones(1)):
        for path in own_paths():
            ((bound,),), _ = sweep_bounds_of(library, one[None], other[None], given, metric, path)
            if metric == "l2":
                assert 1 - Fraction(float(bound)) / 2 >= 2 * expanded + 2 * swept + 9 * UNIT
            else:
                assert -Fraction(float(bound)) >= expanded + swept + 4 * UNIT
