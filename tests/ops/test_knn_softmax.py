"""knn_softmax: values, padding, NaN, strides, threads, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import knnext
from knnext import reference
from knnext.testing import assert_close
from tests.ops.bad_arguments import assert_refused
from tests.ops.mixing_cases import (
    INF,
    NAN,
    assert_compiles,
    assert_same_bits_whatever_the_threads,
    drawn_neighbors,
    neighbors,
)

OP = torch.ops.knnext.knn_softmax
SHAPES = [(1, 1, 1), (3, 7, 2), (5, 64, 13), (4, 65, 1000), (2, 1024, 33344), (3, 1025, 50257)]


def wanted(distances, tokens, temperature, vocab_size: int) -> torch.Tensor:
    return reference.knn_softmax(distances.double(), tokens, temperature, vocab_size)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 300.0])
@pytest.mark.parametrize("token_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("rows", "k", "vocab_size"), SHAPES)
def test_values(rows: int, k: int, vocab_size: int, token_dtype, temperature: float) -> None:
    distances, tokens = neighbors(rows, k, vocab_size)
    got = knnext.knn_softmax(distances, tokens.to(token_dtype), temperature, vocab_size)
    assert got.dtype == torch.float32
    assert_close(got, wanted(distances, tokens, temperature, vocab_size), "probability")
    total = (tokens >= 0).any(1).double()
    torch.testing.assert_close(got.double().sum(1), total, rtol=0, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(drawn_neighbors())
def test_any_neighbors(case) -> None:
    distances, tokens, temperature, vocab_size = case
    got = knnext.knn_softmax(distances, tokens, temperature, vocab_size)
    assert_close(got, wanted(distances, tokens, temperature, vocab_size), "probability")
    wide = knnext.knn_softmax(distances.double(), tokens, temperature, vocab_size)
    assert wide.dtype == torch.float64
    assert_close(wide, wanted(distances, tokens, temperature, vocab_size), "float64")


def test_padding_is_not_the_last_token() -> None:
    distances, tokens = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[-1, 2, -1]])
    assert knnext.knn_softmax(distances, tokens, 1.0, 4).tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("junk", [-1e30, -INF, 0.0, NAN, INF])
def test_padding_that_sorts_first_weighs_nothing(junk: float) -> None:
    distances, tokens = torch.tensor([[junk, 5.0, 5.0]]), torch.tensor([[-1, 0, 1]])
    assert knnext.knn_softmax(distances, tokens, 1.0, 2).tolist() == [[0.5, 0.5]]


def test_a_row_without_a_neighbor_is_zero() -> None:
    distances = torch.tensor([[INF, INF], [1.0, 2.0], [INF, INF], [3.0, INF]])
    tokens = torch.tensor([[-1, -1], [-1, -1], [0, 1], [2, 0]])
    got = knnext.knn_softmax(distances, tokens, 1.0, 3)
    assert got.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("bad", [NAN, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_distance_spoils_its_row_and_no_other(bad: float, dtype: torch.dtype) -> None:
    distances, tokens = neighbors(3, 40, 50)
    distances[2, 33], tokens[2, 33] = bad, 7
    got = knnext.knn_softmax(distances.to(dtype), tokens, 1.0, 50)
    assert got[2].isnan().all() and got[:2].isfinite().all()


def test_large_distances_lose_nothing() -> None:
    distances, tokens = neighbors(4, 200, 100, base=65536.0)
    got = knnext.knn_softmax(distances, tokens, 3.0, 100)
    assert_close(got, wanted(distances, tokens, 3.0, 100), "probability")


def test_one_giant_cluster_of_equal_distances() -> None:
    distances, tokens = torch.full((2, 10007), 3.7), torch.zeros(2, 10007, dtype=torch.int64)
    tokens[1] = torch.arange(10007)
    got = knnext.knn_softmax(distances, tokens, 0.3, 10007)
    assert got[0, 0] == 1.0 and (got[1] == got[1, 0]).all()
    assert got[1].double().sum().item() == pytest.approx(1, abs=1e-7)


def test_token_ids_beyond_int16_and_int32_products() -> None:
    tokens = torch.tensor([[262143, 70000, 32768, 65536]])
    got = knnext.knn_softmax(torch.zeros(1, 4), tokens.int(), 1.0, 262144)
    assert got.nonzero()[:, 1].tolist() == [32768, 65536, 70000, 262143]


@pytest.mark.slow
def test_an_output_past_2_31_entries() -> None:
    rows, vocab_size = 33, 1 << 26
    if _free_bytes() < 12 << 30:
        pytest.skip("needs 12 GB of free memory")
    tokens = torch.full((rows, 1), vocab_size - 1)
    got = knnext.knn_softmax(torch.zeros(rows, 1), tokens, 1.0, vocab_size)
    assert got[:, -1].tolist() == [1.0] * rows and got[:, -2].sum() == 0 and got[:, 0].sum() == 0


def _free_bytes() -> int:
    with open("/proc/meminfo") as lines:  # noqa: PTH123
        return next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable"))


def test_empty_sizes() -> None:
    none = torch.zeros(0, 5, dtype=torch.int64)
    assert knnext.knn_softmax(torch.zeros(0, 5), none, 1.0, 9).shape == (0, 9)
    none = torch.zeros(3, 0, dtype=torch.int64)
    assert knnext.knn_softmax(torch.zeros(3, 0), none, 1.0, 2).tolist() == [[0, 0]] * 3


def test_strides() -> None:
    distances, tokens = neighbors(6, 40, 30)
    want = knnext.knn_softmax(distances, tokens, 2.0, 30)
    wide = torch.stack([distances, distances + 1], 2).reshape(6, 80)
    for d in (distances.T.contiguous().T, wide[:, ::2], torch.cat([distances] * 2, 1)[:, 40:]):
        assert torch.equal(knnext.knn_softmax(d, tokens.T.contiguous().T, 2.0, 30), want)
    one = knnext.knn_softmax(distances[:1].expand(6, 40), tokens[:1].expand(6, 40), 2.0, 30)
    assert torch.equal(one, want[:1].expand(6, 30))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_temperature_by_row_and_as_a_scalar_tensor(dtype: torch.dtype) -> None:
    distances, tokens = neighbors(4, 30, 20)
    by_row = torch.tensor([0.5, 1.0, 8.0, 100.0], dtype=dtype)
    got = knnext.knn_softmax(distances, tokens, by_row, 20)
    strided = knnext.knn_softmax(distances, tokens, by_row.repeat_interleave(2)[::2], 20)
    assert torch.equal(strided, got)
    for row, t in enumerate(by_row):
        one = knnext.knn_softmax(distances[[row]], tokens[[row]], float(t), 20)
        assert torch.equal(got[[row]], one)
        assert torch.equal(knnext.knn_softmax(distances[[row]], tokens[[row]], t, 20), one)


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e300])
def test_a_temperature_beyond_float32(temperature: float) -> None:
    distances, tokens = torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[0, 1, 2]])
    got = knnext.knn_softmax(distances, tokens, temperature, 3)[0].tolist()
    assert got == pytest.approx([1 / 3] * 3 if temperature > 1 else [0.5, 0.5, 0])


def test_same_bits_whatever_the_threads() -> None:
    distances, tokens = neighbors(301, 200, 500)
    assert_same_bits_whatever_the_threads(lambda: knnext.knn_softmax(distances, tokens, 3.0, 500))


def test_the_default_dtype_changes_nothing() -> None:
    distances, tokens = neighbors(3, 40, 50)
    want = knnext.knn_softmax(distances, tokens, 3.0, 50)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(knnext.knn_softmax(distances, tokens, 3.0, 50), want)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bad", [100, -2, 1 << 40, (1 << 32) + 5, -(1 << 40)])
def test_a_token_outside_the_vocabulary_is_named(bad: int) -> None:
    distances, tokens = neighbors(300, 30, 100)
    tokens[70, 3], tokens[200, 3] = bad, 4444
    message = rf"tokens must lie in \[-1, V\) with V = 100, got {bad} in row 70"
    with pytest.raises(RuntimeError, match=message):
        knnext.knn_softmax(distances, tokens, 1.0, 100)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF])
def test_a_bad_temperature_in_a_tensor_is_named(bad: float) -> None:
    distances, tokens = neighbors(3, 5, 9)
    message = f"temperature must be a finite number above 0, got {bad:g} in row"
    with pytest.raises(RuntimeError, match=message + " 2"):
        knnext.knn_softmax(distances, tokens, torch.tensor([1.0, 2.0, bad]), 9)
    with pytest.raises(RuntimeError, match=message + " 0"):
        knnext.knn_softmax(distances, tokens, torch.tensor(bad), 9)


D, T = torch.rand(3, 4), torch.zeros(3, 4, dtype=torch.int64)
BAD = {
    "distances dtype": (D.half(), T, 1.0, 9, "distances must be a float32 or float64 tensor"),
    "distances shape": (D[0], T, 1.0, 9, "of shape (Q, k), got a float32 tensor of shape (4,)"),
    "tokens dtype": (D, T.short(), 1.0, 9, "tokens must be an int64 or int32 tensor"),
    "tokens bool": (D, T.bool(), 1.0, 9, "got a bool tensor of shape (3, 4)"),
    "tokens float": (D, D, 1.0, 9, "got a float32 tensor of shape (3, 4)"),
    "tokens shape": (D, T[:, 1:], 1.0, 9, "of shape (3, 4), got an int64 tensor of shape (3, 3)"),
    "temperature zero": (D, T, 0.0, 9, "temperature must be a finite number above 0, got 0"),
    "temperature below": (D, T, -2.5, 9, "above 0, got -2.5"),
    "temperature nan": (D, T, NAN, 9, "above 0, got nan"),
    "temperature inf": (D, T, INF, 9, "above 0, got inf"),
    "temperature rows": (D, T, torch.ones(2), 9, "temperature must be a number or a float16"),
    "temperature 2-d": (D, T, torch.ones(3, 1), 9, "of shape () or (3,), got a float32 tensor"),
    "temperature dtype": (D, T, torch.tensor(1), 9, "got an int64 tensor of shape ()"),
    "vocab_size": (D, T, 1.0, 0, "vocab_size must be at least 1, got 0"),
    "vocab_size below": (D, T, torch.tensor(1.0), -5, "vocab_size must be at least 1, got -5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_alike_by_real_and_fake_tensors(name: str) -> None:
    *args, match = BAD[name]
    assert_refused(knnext.knn_softmax, match, *args)


def test_opcheck() -> None:
    distances, tokens = neighbors(3, 6, 5)
    for d in (distances.requires_grad_(), distances.detach().double().requires_grad_()):
        torch.library.opcheck(OP.default, (d, tokens, 0.7, 5))
        for t in (torch.tensor(0.7), torch.rand(3) + 0.5):
            torch.library.opcheck(OP.tensor, (d, tokens, t.requires_grad_(), 5))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_gradients_first_and_second(shape) -> None:
    distances, tokens = neighbors(3, 6, 5)
    present = distances < INF
    inner = distances.double().masked_fill(~present, 1.0).div(10).requires_grad_()
    t = torch.rand(shape, dtype=torch.float64).add(0.5).requires_grad_()

    def run(inner, t):
        return knnext.knn_softmax(inner.masked_fill(~present, INF), tokens, t, 5)

    assert torch.autograd.gradcheck(run, (inner, t))
    assert torch.autograd.gradgradcheck(run, (inner, t))
    number = lambda d: knnext.knn_softmax(d.masked_fill(~present, INF), tokens, 0.7, 5)  # noqa: E731
    assert torch.autograd.gradcheck(number, inner)


def test_a_scalar_tensor_keeps_its_gradient_through_the_bare_op() -> None:
    distances, tokens = neighbors(3, 6, 5)
    t = torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(OP(distances, tokens, t, 5)[:, 0].sum(), t)
    assert grad.shape == () and grad != 0


@pytest.mark.parametrize("leaves", [(True, False), (False, True), (True, True)])
def test_float32_gradients_of_any_subset_are_finite_and_right(leaves) -> None:
    distances, tokens = neighbors(4, 60, 12, base=3000.0)
    distances[3, 2], tokens[3, 2] = INF, 4  # a real token at +inf weighs nothing either
    upstream = torch.randn(4, 12)

    def grads(run, dtype):
        d = distances.to(dtype).requires_grad_(leaves[0])
        t = torch.tensor([1.0, 3.0, 9.0, 0.1], dtype=dtype).requires_grad_(leaves[1])
        loss = (run(d, tokens, t, 12) * upstream).sum()
        return torch.autograd.grad(loss, [x for x in (d, t) if x.requires_grad])

    want = grads(knnext.knn_softmax, torch.float64)
    for got, w in zip(grads(knnext.knn_softmax, torch.float32), want, strict=True):
        assert got.dtype == torch.float32 and got.isfinite().all()
        assert_close(got, w, "gradient", w.abs().max().item())


def test_compiles_as_one_graph_with_its_gradient() -> None:
    def make(rows: int) -> list[torch.Tensor]:
        distances, tokens = neighbors(rows, 8, 11)
        return [distances.requires_grad_(), tokens, torch.tensor(2.0, requires_grad=True)]

    assert_compiles(lambda d, t, s: knnext.knn_softmax(d, t, s, 11).square().sum(), make)
    assert_compiles(lambda d, t, s: knnext.knn_softmax(d, t, 1.5, 11).square().sum() + 0 * s, make)
