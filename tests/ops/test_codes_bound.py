"""What codes say of a distance holds: never above what the search computes, and not far below it.

That each margin is needed, and seen, is shown by mutations (test_codes_bound_mutations.py).
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.ops.code_bounds import (
    NEEDS,
    PATHS,
    coded,
    errors_too_small,
    mean,
    own_paths,
    planted_rows,
    run,
    said,
)
from tests.ops.test_knn_search_refine import CLOUDS

pytestmark = NEEDS

DIMS = [1, 2, 3, 7, 64, 65, 129, 576, 1600, 4096]
INF = float("inf")


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
