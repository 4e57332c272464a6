"""How the emulated tensor cores add, and that the search keeps its promise on them.

On sm_8x a block of 8 products and the sum are cut 24 bits below the largest exponent among them,
from sm_90 on a block of 16 at 25, always towards zero (microsoft's MMA-Sim, measured on the units).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from knnext.testing import TOLERANCES, assert_search, true_distances
from tests.emulator.build import call, compiler_found, load
from tests.emulator.search import sampled, search

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=[80, 90])
def sm(request: pytest.FixtureRequest) -> Iterator[int]:
    call(load().emulate_tensor_core, request.param)
    yield request.param
    call(load().emulate_tensor_core, 90)


def products(a: Tensor, b: Tensor) -> Tensor:
    """(16, 8) sums of (16, 16) and (8, 16)."""
    d = torch.full((16, 8), float("nan"))
    call(load().emulate_mma, 1, a.half(), b.half(), d, False)
    return d


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_lies_below_the_largest_is_cut_towards_zero(sm: int, sign: float) -> None:
    # 1 and fifteen times 2^-25, half a unit on sm_8x and one on sm_90: nothing is left of them
    # there, and here 15/4 of a float's last bit, which are cut to 3.
    a, b = torch.full((16, 16), 2.0**-12), torch.full((8, 16), sign * 2.0**-13)
    a[:, 0], b[:, 0] = 1.0, sign
    kept = 0 if sm == 80 else 3
    assert (products(a, b) == sign * (1 + kept * 2.0**-23)).all()


def test_a_block_ends_where_it_does(sm: int) -> None:
    # The large ones meet in one block of sixteen, but not in one of eight: what they leave of the
    # small one beside them is told by whether they have gone before.
    a, b = torch.zeros(16, 16), torch.ones(8, 16)
    a[:, 0], a[:, 1], a[:, 8] = 2.0**13, -(2.0**13), 2.0**-13
    assert (products(a, b) == (2.0**-13 if sm == 80 else 0.0)).all()


def test_an_exponent_is_that_of_the_factors(sm: int) -> None:
    # 1.5 * 1.5 counts as 2^0, although it is 2.25: 2^-24 is cut on neither.
    a, b = torch.zeros(16, 16), torch.zeros(8, 16)
    a[:, 0], b[:, 0] = 1.5, -1.5
    a[:, 1], b[:, 1] = 1.5, 1.5
    a[:, 2], b[:, 2] = 2.0**-12, 2.0**-12
    assert (products(a, b) == 2.0**-24).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [96, 1024, 2048])
def test_distances_keep_to_the_tolerance(sm: int, dim: int, dtype: torch.dtype) -> None:
    # Keys like the queries: products nearly all of one sign, the worst case of a one-sided cut.
    base = torch.rand(1, dim) + 0.5
    queries = (base + 0.01 * torch.randn(16, dim)).to(dtype)
    keys = (base + 0.01 * torch.randn(96, dim)).to(dtype)
    for metric in ("l2", "ip"):
        result = search(queries, keys, 96, metric)
        assert_search(result, queries, keys, 96, metric, kind="tensor_core")
        if metric == "ip" and dim == 1024:
            want, scale = true_distances(queries, keys, metric)
            error = (result[0].double() - want.gather(1, result[1])) / scale.gather(1, result[1])
            assert (error >= -1e-9).all(), "products are cut, so distances are never too small"
            assert error.max() > TOLERANCES["expanded"].relative, "the old promise is not kept"


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["few", "small", "large", "filter", "owner"])
def test_sampled_thresholds_lose_no_neighbor(sm: int, shape: str) -> None:
    """The thresholds are made of the same cut sums that are compared with them."""
    if sm == 80 and shape in ("filter", "owner"):
        pytest.skip("Hopper's own")
    base = torch.rand(1, 256) + 0.5
    queries = (base + 0.02 * torch.randn(20, 256)).half()
    keys = (base + 0.02 * torch.randn(700, 256)).half()
    keys[300:400] = keys[200:300]
    failures: list[int] = []
    how = sampled(rank=30) if shape != "owner" else {}
    few = search(queries, keys, 12, shape=shape, failures=failures, **how)
    whole = search(queries, keys, 700, shape="large")
    assert torch.equal(few[0], whole[0][:, :12]) and torch.equal(few[1], whole[1][:, :12])
