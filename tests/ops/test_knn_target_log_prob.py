"""knn_target_log_prob: values, targets that match nothing, gradients, errors."""

from __future__ import annotations

import math
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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

OP = torch.ops.knnext.knn_target_log_prob


def wanted(distances, tokens, targets, temperature) -> torch.Tensor:
    return reference.knn_target_log_prob(distances.double(), tokens, targets, temperature)


@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("token_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("k", "vocab_size"), [(1, 1), (7, 3), (64, 9), (1025, 40), (2049, 300)])
def test_values(k: int, vocab_size: int, token_dtype, target_dtype) -> None:
    distances, tokens = neighbors(20, k, vocab_size)
    targets = torch.randint(-1, vocab_size, (20,))
    for temperature in (0.05, 3.0):
        args = (tokens.to(token_dtype), targets.to(target_dtype), temperature)
        got = knnext.knn_target_log_prob(distances, *args)
        assert got.dtype == torch.float32
        assert_close(got, wanted(distances, tokens, targets, temperature), "log_probability")


@settings(max_examples=100, deadline=None)
@given(drawn_neighbors(), st.data())
def test_any_neighbors(case, data) -> None:
    distances, tokens, temperature, vocab_size = case
    rows = distances.shape[0]
    target = st.integers(-1, vocab_size) | st.just(-100)
    targets = torch.tensor(data.draw(st.lists(target, min_size=rows, max_size=rows))).long()
    want = wanted(distances, tokens, targets, temperature)
    got = knnext.knn_target_log_prob(distances, tokens, targets, temperature)
    assert_close(got, want, "log_probability")
    wide = knnext.knn_target_log_prob(distances.double(), tokens, targets, temperature)
    assert_close(wide, want, "float64")


def test_agrees_with_the_whole_row() -> None:
    distances, tokens = neighbors(30, 100, 20)
    every = knnext.knn_interpolate(torch.zeros(30, 20), distances, tokens, 0.4, 1.0)
    every[1] = -INF  # no neighbor: there the mixture is the LM, and p_knn is nothing
    for target in range(20):
        targets = torch.full((30,), target)
        got = knnext.knn_target_log_prob(distances, tokens, targets, 0.4)
        assert_close(got, every[:, target], "log_probability")


@pytest.mark.parametrize("target", [-1, -100, -(1 << 40)])
def test_a_negative_target_matches_nothing_not_even_padding(target: int) -> None:
    distances, tokens = neighbors(4, 30, 5)
    got = knnext.knn_target_log_prob(distances, tokens, torch.full((4,), target), 1.0)
    assert (got == -INF).all()


def test_a_target_that_differs_only_past_32_bits_does_not_match() -> None:
    tokens = torch.tensor([[5, (1 << 32) + 5]])
    targets = torch.tensor([(1 << 32) + 5])
    got = knnext.knn_target_log_prob(torch.zeros(1, 2), tokens, targets, 1.0)
    assert got.item() == pytest.approx(math.log(0.5))
    got = knnext.knn_target_log_prob(torch.zeros(1, 2), tokens.int(), targets, 1.0)
    assert got.item() == -INF


def test_a_probability_too_small_for_float32_keeps_its_log() -> None:
    distances, tokens = torch.tensor([[0.0, 1000.0, 1000.0]]), torch.tensor([[0, 1, 1]])
    got = knnext.knn_target_log_prob(distances, tokens, torch.tensor([1]), 1.0)
    assert got.item() == pytest.approx(-1000 + math.log(2), rel=1e-7)


def test_a_row_without_a_neighbor() -> None:
    distances, tokens = torch.tensor([[INF, INF], [1.0, 2.0]]), torch.tensor([[0, 1], [-1, -1]])
    got = knnext.knn_target_log_prob(distances, tokens, torch.tensor([0, 0]), 1.0)
    assert got.tolist() == [-INF, -INF]
    none = torch.zeros(2, 0)
    got = knnext.knn_target_log_prob(none, none.long(), torch.tensor([0, 0]), 1.0)
    assert got.tolist() == [-INF, -INF]
    no_rows = (none[:0], none[:0].long(), torch.zeros(0).long())
    assert knnext.knn_target_log_prob(*no_rows, 1.0).shape == (0,)


@pytest.mark.parametrize("bad", [NAN, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_distance_spoils_its_row_and_no_other(bad: float, dtype: torch.dtype) -> None:
    distances, tokens = neighbors(3, 40, 50)
    distances[2, 33], tokens[2, 33] = bad, 7
    for target in (7, 49, -1):  # also for tokens that another neighbor has, or none
        targets = torch.full((3,), target)
        got = knnext.knn_target_log_prob(distances.to(dtype), tokens, targets, 1.0)
        assert got[2].isnan() and not got[:2].isnan().any()
    distances[2, 33], tokens[2, 33] = NAN, -1
    got = knnext.knn_target_log_prob(distances, tokens, torch.zeros(3).long(), 1.0)
    assert not got.isnan().any()


def test_strides_and_temperatures_by_row() -> None:
    distances, tokens = neighbors(4, 40, 6)
    targets, t = torch.tensor([0, 1, 2, 3]), torch.tensor([0.5, 1.0, 8.0, 100.0])
    want = knnext.knn_target_log_prob(distances, tokens, targets, t)
    flipped = distances.T.contiguous().T, tokens.T.contiguous().T
    pairs = targets.repeat_interleave(2)[::2], t.repeat_interleave(2)[::2]
    assert torch.equal(knnext.knn_target_log_prob(*flipped, *pairs), want)
    for row in range(4):
        one = (distances[[row]], tokens[[row]], targets[[row]])
        assert knnext.knn_target_log_prob(*one, t[row]) == want[row]
        assert knnext.knn_target_log_prob(*one, float(t[row])) == want[row]


def test_same_bits_whatever_the_threads() -> None:
    distances, tokens = neighbors(3001, 200, 9)
    targets = torch.randint(0, 9, (3001,))
    assert_same_bits_whatever_the_threads(
        lambda: knnext.knn_target_log_prob(distances, tokens, targets, 3.0)
    )


def test_makes_no_tensor_of_the_vocabulary() -> None:
    distances, tokens = neighbors(2000, 50, 200_000)  # a (Q, V) tensor would take 1.6 GB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    knnext.knn_target_log_prob(distances, tokens, tokens[:, 0].contiguous(), 1.0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


D, T, G = torch.rand(3, 4), torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3).long()
BAD = {
    "distances": (D[:, 0], T, G, 1.0, "distances must be a float32 or float64 tensor"),
    "tokens": (D, T.short(), G, 1.0, "tokens must be an int64 or int32 tensor of shape (3, 4)"),
    "targets dtype": (D, T, G.float(), 1.0, "targets must be an int64 or int32 tensor"),
    "targets shape": (D, T, G[:, None], 1.0, "of shape (3,), got an int64 tensor of shape (3, 1)"),
    "targets rows": (D, T, G[1:], 1.0, "of shape (3,), got an int64 tensor of shape (2,)"),
    "temperature": (D, T, G, 0.0, "temperature must be a finite number above 0, got 0"),
    "temperatures": (D, T, G, torch.ones(4), "temperature must be a number or a float16"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_alike_by_real_and_fake_tensors(name: str) -> None:
    *args, match = BAD[name]
    assert_refused(knnext.knn_target_log_prob, match, *args)


def test_a_token_below_padding_and_a_bad_temperature_are_named() -> None:
    tokens = T.clone()
    tokens[1, 3] = -7
    with pytest.raises(RuntimeError, match="tokens must be at least -1, got -7 in row 1"):
        knnext.knn_target_log_prob(D, tokens, G, 1.0)
    with pytest.raises(RuntimeError, match="finite number above 0, got -1 in row 1"):
        knnext.knn_target_log_prob(D, T, G, torch.tensor([1.0, -1.0, 1.0]))


def test_opcheck() -> None:
    distances, tokens = neighbors(3, 6, 5)
    targets = torch.tensor([int(tokens[0, 0]), 3, -1])
    for d in (distances.requires_grad_(), distances.detach().double().requires_grad_()):
        torch.library.opcheck(OP.default, (d, tokens, targets, 0.7))
        for t in (torch.tensor(0.7), torch.rand(3) + 0.5):
            torch.library.opcheck(OP.tensor, (d, tokens, targets, t.requires_grad_()))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_gradients_first_and_second(shape) -> None:
    distances, tokens = torch.rand(3, 6, dtype=torch.float64), torch.randint(0, 3, (3, 6))
    tokens[0, 2], targets = -1, tokens[:, 0].clone()
    t = torch.rand(shape, dtype=torch.float64).add(0.5).requires_grad_()

    def run(distances, t):
        return knnext.knn_target_log_prob(distances, tokens, targets, t)

    assert torch.autograd.gradcheck(run, (distances.requires_grad_(), t))
    assert torch.autograd.gradgradcheck(run, (distances, t))


def test_gradient_is_zero_where_nothing_matches_and_finite_where_p_underflows() -> None:
    distances = torch.tensor([[0.0, 500.0], [0.0, 1.0], [INF, 1.0]], requires_grad=True)
    tokens, targets = torch.tensor([[0, 1], [0, 1], [2, 2]]), torch.tensor([1, 5, 2])
    t = torch.tensor(1.0, requires_grad=True)
    out = knnext.knn_target_log_prob(distances, tokens, targets, t)
    grad, grad_t = torch.autograd.grad(out.sum(), (distances, t))
    assert grad.tolist() == [[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]
    assert grad_t.item() == 500


def test_compiles_as_one_graph_with_its_gradient() -> None:
    def make(rows: int) -> list[torch.Tensor]:
        distances, tokens = neighbors(rows, 8, 11)
        distances[1], tokens[1] = 1.0, 3
        targets, t = tokens.amax(1), torch.tensor(2.0, requires_grad=True)
        return [distances.requires_grad_(), tokens, targets, t]

    def by_number(d, tokens, targets, t):
        return knnext.knn_target_log_prob(d, tokens, targets, 2.0).sum() + 0 * t

    assert_compiles(lambda *args: knnext.knn_target_log_prob(*args).sum(), make)
    assert_compiles(by_number, make)
