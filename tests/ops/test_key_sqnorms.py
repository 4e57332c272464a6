"""key_sqnorms: values, strides, and that they are the search's own."""

from __future__ import annotations

import warnings

import pytest
import torch

import knnext
from knnext.testing import assert_close, assert_equal_results
from tests.ops.bad_arguments import assert_refused

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 65, 255, 256, 257, 1600, 4096])
@pytest.mark.parametrize("num_keys", [0, 1, 49, 1000])
def test_values(dtype: torch.dtype, dim: int, num_keys: int) -> None:
    keys = torch.randn(num_keys, dim).to(dtype)
    norms = knnext.key_sqnorms(keys)
    assert norms.dtype == torch.float32
    assert_close(norms, keys.double().square().sum(1), "sqnorm")


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    base = torch.randn(60, 90).to(dtype)
    for keys in (base.T, base[::2], base[:, ::3], base[:1].expand(33, 90)):
        assert torch.equal(knnext.key_sqnorms(keys), knnext.key_sqnorms(keys.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_or_not_the_search_is_the_same_bits(dtype: torch.dtype) -> None:
    queries, keys = torch.randn(9, 300).to(dtype), torch.randn(777, 300).to(dtype)
    given = knnext.knn_search(queries, keys, 50, key_sqnorms=knnext.key_sqnorms(keys))
    assert_equal_results(given, knnext.knn_search(queries, keys, 50))


def test_past_the_range_of_half() -> None:
    keys = torch.full((3, 100), 6e4).half()
    assert_close(knnext.key_sqnorms(keys), keys.double().square().sum(1), "sqnorm")


def test_infinity_and_nan_stay() -> None:
    keys = torch.ones(3, 20)
    keys[0, 3], keys[1, 19] = float("nan"), float("-inf")
    norms = knnext.key_sqnorms(keys)
    assert norms[0].isnan() and norms[1] == float("inf") and norms[2] == 20


def test_bad_arguments() -> None:
    match = "keys must be a float16, bfloat16 or float32 tensor of shape (N, D)"
    for keys in (torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)):
        assert_refused(knnext.key_sqnorms, match, keys)


def test_opcheck_and_no_gradient() -> None:
    keys = torch.randn(5, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.knnext.key_sqnorms, (keys,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not knnext.key_sqnorms(keys).requires_grad


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(
        lambda x: knnext.key_sqnorms(x) + 1, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (4, 9):
        keys = torch.randn(n, 5)
        assert torch.equal(compiled(keys), knnext.key_sqnorms(keys) + 1)
