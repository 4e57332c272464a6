"""knn_interpolate: values in log space, both ends of lmbda, logits of every kind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import knnext
from knnext import reference
from knnext.testing import assert_close
from tests.ops.mixing_cases import (
    INF,
    NAN,
    assert_same_bits_whatever_the_threads,
    drawn_neighbors,
    neighbors,
)

SHAPES = [(1, 1, 1), (3, 7, 2), (5, 64, 13), (4, 65, 1000), (2, 1024, 33344), (3, 1025, 50257)]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def wanted(logits, distances, tokens, temperature, lmbda) -> torch.Tensor:
    args = (logits.double(), distances.double(), tokens, temperature, lmbda)
    return reference.knn_interpolate(*args)


@pytest.mark.parametrize("lmbda", [0.0, 1e-30, 0.25, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("token_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("rows", "k", "vocab_size"), SHAPES)
def test_values(rows: int, k: int, vocab_size: int, token_dtype, lmbda: float) -> None:
    distances, tokens = neighbors(rows, k, vocab_size)
    logits = 5 * torch.randn(rows, vocab_size)
    got = knnext.knn_interpolate(logits, distances, tokens.to(token_dtype), 2.0, lmbda)
    assert got.dtype == torch.float32
    assert_close(got, wanted(logits, distances, tokens, 2.0, lmbda), "log_probability")


@settings(max_examples=100, deadline=None)
@given(drawn_neighbors(), st.floats(0, 1) | st.sampled_from([0.0, 1.0]), st.data())
def test_any_neighbors(case, lmbda: float, data) -> None:
    distances, tokens, temperature, vocab_size = case
    rows = distances.shape[0]
    entry = st.floats(-30, 30, width=32) | st.just(-1e4)
    flat = data.draw(st.lists(entry, min_size=rows * vocab_size, max_size=rows * vocab_size))
    logits = torch.tensor(flat).reshape(rows, vocab_size).float()
    want = wanted(logits, distances, tokens, temperature, lmbda)
    got = knnext.knn_interpolate(logits, distances, tokens, temperature, lmbda)
    assert_close(got, want, "log_probability")
    wide = knnext.knn_interpolate(logits, distances.double(), tokens, temperature, lmbda)
    assert wide.dtype == torch.float64
    assert_close(wide, want, "float64")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("vocab_size", [5, 16, 1031])
def test_logits_of_any_float_dtype(dtype: torch.dtype, wide: bool, vocab_size: int) -> None:
    distances, tokens = neighbors(4, 30, vocab_size)
    logits = (6 * torch.randn(4, vocab_size)).to(dtype)
    logits[0, 0], logits[0, 1] = 1e-7, -6e-6  # subnormal in half
    d = distances.double() if wide else distances
    got = knnext.knn_interpolate(logits, d, tokens, 2.0, 0.3)
    kind = "float64" if wide else "log_probability"
    assert_close(got, wanted(logits, distances, tokens, 2.0, 0.3), kind)


def test_half_logits_of_every_value() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.float16)
    every = every[every.isfinite()][None]
    none = torch.zeros(1, 0, dtype=torch.int64)
    got = knnext.knn_interpolate(every, torch.zeros(1, 0), none, 1.0, 0.5)
    assert_close(got, every.double().log_softmax(1), "log_probability")


def test_lmbda_0_is_log_softmax_and_nothing_else() -> None:
    distances, tokens = neighbors(5, 50, 70)
    logits = torch.randn(5, 70)
    logits[0, 3], logits[4] = -INF, 1e4
    got = knnext.knn_interpolate(logits, distances, tokens, 1.0, 0.0)
    assert_close(got, logits.double().log_softmax(1), "log_probability")


def test_lmbda_1_is_the_true_log_where_p_knn_underflows() -> None:
    distances = torch.tensor([[0.0, 1e3, 1e3, 5e4, 1e30, 3e38]])
    tokens = torch.tensor([[0, 1, 1, 2, 3, 4]])
    got = knnext.knn_interpolate(torch.zeros(1, 6), distances, tokens, 2.0, 1.0)[0]
    want = [0.0, -500 + math.log(2), -25000.0, -5e29, -1.5e38, -INF]
    assert got.tolist() == pytest.approx(want, rel=1e-6)
    assert knnext.knn_softmax(distances, tokens, 2.0, 6)[0, 1:].sum() == 0


def test_a_tiny_p_knn_counts_where_the_lm_gives_nothing() -> None:
    logits = torch.tensor([[0.0, -INF, -1e5, -INF]])
    distances, tokens = torch.tensor([[0.0, 900.0, 200.0]]), torch.tensor([[0, 1, 2]])
    got = knnext.knn_interpolate(logits, distances, tokens, 1.0, 0.5)[0].tolist()
    assert got == pytest.approx([0.0, -900 + math.log(0.5), -200 + math.log(0.5), -INF])


@pytest.mark.parametrize("lmbda", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_without_a_neighbor_is_the_lm_alone(lmbda: float, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 9, dtype=dtype)
    distances = torch.tensor([[INF, INF], [1.0, 2.0], [INF, INF]], dtype=dtype)
    tokens = torch.tensor([[-1, -1], [-1, -1], [4, 5]])
    got = knnext.knn_interpolate(logits, distances, tokens, 1.0, lmbda)
    assert_close(got, logits.double().log_softmax(1), "log_probability")
    none = torch.zeros(3, 0)
    got = knnext.knn_interpolate(logits, none.to(dtype), none.long(), 1.0, lmbda)
    assert_close(got, logits.double().log_softmax(1), "log_probability")


@pytest.mark.parametrize("junk", [-1e30, -INF, 0.0, NAN, INF])
def test_padding_that_sorts_first_weighs_nothing(junk: float) -> None:
    distances, tokens = torch.tensor([[junk, 5.0, 5.0]]), torch.tensor([[-1, 0, 1]])
    got = knnext.knn_interpolate(torch.zeros(1, 4), distances, tokens, 1.0, 0.5)
    assert got.exp()[0].tolist() == pytest.approx([0.375, 0.375, 0.125, 0.125])


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_infinite_logits_spoil_their_row_and_no_other(lmbda: float, dtype) -> None:
    distances, tokens = neighbors(5, 40, 2100)
    logits = torch.randn(5, 2100)
    logits[1, 2000], logits[2] = NAN, -INF
    logits[3, 5] = INF
    logits[0, :1100] = -INF  # the first block summed holds nothing at all
    got = knnext.knn_interpolate(logits, distances.to(dtype), tokens, 1.0, lmbda)
    assert got[[1, 2, 3]].isnan().all() and not got[[0, 4]].isnan().any()
    # Nothing but NaN among the -inf: the maximum must not hide it.
    logits[0] = -INF
    logits[0, 7] = NAN
    got = knnext.knn_interpolate(logits, distances.to(dtype), tokens, 1.0, lmbda)
    assert got[0].isnan().all()


@pytest.mark.parametrize("bad", [NAN, -INF])
@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_a_nan_distance_spoils_its_row_and_no_other(bad: float, lmbda: float) -> None:
    distances, tokens = neighbors(3, 40, 50)
    distances[2, 33], tokens[2, 33] = bad, 7
    got = knnext.knn_interpolate(torch.randn(3, 50), distances, tokens, 1.0, lmbda)
    assert got[2].isnan().all() and not got[:2].isnan().any()


def test_large_logits_and_distances_lose_nothing() -> None:
    distances, tokens = neighbors(4, 200, 3000, base=65536.0)
    logits = (3e4 + 5 * torch.randn(4, 3000)).float()
    got = knnext.knn_interpolate(logits, distances, tokens, 3.0, 0.25)
    want = wanted(logits, distances, tokens, 3.0, 0.25)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6)


def test_strides() -> None:
    distances, tokens = neighbors(6, 40, 30)
    logits = torch.randn(6, 30)
    want = knnext.knn_interpolate(logits, distances, tokens, 2.0, 0.25)
    positions = torch.randn(6, 5, 30)
    positions[:, -1] = logits
    for x in (logits.T.contiguous().T, positions[:, -1], torch.cat([logits] * 2, 1)[:, 30:]):
        got = knnext.knn_interpolate(x, distances.T.contiguous().T, tokens, 2.0, 0.25)
        assert torch.equal(got, want)
    one = knnext.knn_interpolate(logits[:1].expand(6, 30), distances, tokens, 2.0, 0.0)
    torch.testing.assert_close(one, logits[:1].log_softmax(1).expand(6, 30))


def test_parameters_by_row_as_scalars_and_mixed_with_numbers() -> None:
    distances, tokens = neighbors(4, 30, 20)
    logits = torch.randn(4, 20)
    t, lmbda = torch.tensor([0.5, 1.0, 8.0, 100.0]), torch.tensor([0.0, 0.3, 0.7, 1.0])

    def run(t, lmbda, rows=slice(None)):
        return knnext.knn_interpolate(logits[rows], distances[rows], tokens[rows], t, lmbda)

    got = run(t, lmbda)
    for row in range(4):
        one = run(t[row], lmbda[row], slice(row, row + 1))
        assert torch.equal(got[row], one[0])
        number = run(float(t[row]), float(lmbda[row]), slice(row, row + 1))
        assert torch.equal(number, one)
        assert torch.equal(run(float(t[row]), lmbda), run(t[row], lmbda))
        assert torch.equal(run(t, float(lmbda[row])), run(t, lmbda[row]))


def test_empty_sizes() -> None:
    none = torch.zeros(0, 5)
    got = knnext.knn_interpolate(torch.zeros(0, 9), none, none.long(), 1.0, 0.5)
    assert got.shape == (0, 9)


def test_same_bits_whatever_the_threads() -> None:
    distances, tokens = neighbors(301, 200, 500)
    logits = torch.randn(301, 500)
    assert_same_bits_whatever_the_threads(
        lambda: knnext.knn_interpolate(logits, distances, tokens, 3.0, 0.4)
    )


def test_rows_are_distributions() -> None:
    distances, tokens = neighbors(40, 100, 2000)
    got = knnext.knn_interpolate(8 * torch.randn(40, 2000), distances, tokens, 1.0, 0.6)
    total = got.double().exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
