"""knn_interpolate: gradients, refusals, opcheck, compile."""

from __future__ import annotations

import itertools

import pytest
import torch

import knnext
from knnext import reference
from knnext.testing import assert_close
from tests.ops.bad_arguments import assert_refused
from tests.ops.mixing_cases import INF, NAN, assert_compiles, neighbors

OP = torch.ops.knnext.knn_interpolate


@pytest.mark.parametrize("token_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("by_row", [False, True])
def test_gradients_first_and_second(by_row: bool, token_dtype: torch.dtype) -> None:
    distances, tokens = neighbors(3, 6, 5)
    tokens = tokens.to(token_dtype)
    present = distances < INF
    inner = distances.double().masked_fill(~present, 1.0).div(10).requires_grad_()
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    shape = (3,) if by_row else ()
    t = torch.rand(shape, dtype=torch.float64).add(0.5).requires_grad_()
    lmbda = torch.rand(shape, dtype=torch.float64).mul(0.8).add(0.1).requires_grad_()

    def run(logits, inner, t, lmbda):
        d = inner.masked_fill(~present, INF)
        return knnext.knn_interpolate(logits, d, tokens, t, lmbda)

    assert torch.autograd.gradcheck(run, (logits, inner, t, lmbda))
    assert torch.autograd.gradgradcheck(run, (logits, inner, t, lmbda))
    numbers = lambda x, d: run(x, d, 0.7, 0.3)  # noqa: E731
    assert torch.autograd.gradcheck(numbers, (logits, inner))


@pytest.mark.parametrize("lmbda", [0.0, 0.25, 1.0])
def test_float32_gradients_are_those_of_the_reference(lmbda: float) -> None:
    distances, tokens = neighbors(6, 80, 30)
    distances[3, 2], tokens[3, 2] = INF, 4  # a real token at +inf weighs nothing either
    logits = 3 * torch.randn(6, 30)
    upstream = torch.randn(6, 30)
    finite = knnext.knn_interpolate(logits, distances, tokens, 2.0, lmbda) > -INF

    def grads(run, dtype):
        x, d = logits.to(dtype).requires_grad_(), distances.to(dtype).requires_grad_()
        out = run(x, d, tokens, 2.0, lmbda)
        return torch.autograd.grad((out * upstream).masked_fill(~finite, 0.0).sum(), (x, d))

    want = grads(reference_with_safe_ends, torch.float64)
    for got, w in zip(grads(knnext.knn_interpolate, torch.float32), want, strict=True):
        assert got.dtype == torch.float32 and got.isfinite().all()
        assert_close(got, w, "gradient", max(1.0, w.abs().max().item()))


@pytest.mark.parametrize("lmbda", [0.999, 1 - 1e-6, 1.0])
def test_the_gradient_of_lmbda_near_one(lmbda: float) -> None:
    """The others' part is divided by 1 - lmbda, and must hold nothing of the neighbors' tokens."""
    for seed in range(10):
        torch.manual_seed(seed)
        distances, tokens = torch.rand(4, 8), torch.randint(0, 50, (4, 8))
        logits, upstream = torch.randn(4, 50), torch.rand(4, 8)

        def gradient(dtype, logits=logits, distances=distances, tokens=tokens, upstream=upstream):
            weight = torch.full((4,), lmbda, dtype=torch.float64, requires_grad=True)
            out = knnext.knn_interpolate(logits, distances.to(dtype), tokens, 1.0, weight)
            (out.gather(1, tokens) * upstream).sum().backward()
            return weight.grad

        # What of p_lm / p stands at the tokens that neighbors have, in float64 and by itself.
        d, p_lm = distances.double(), logits.double().softmax(1)
        p_knn = reference.knn_softmax(d, tokens, 1.0, 50)
        slope = (p_knn - p_lm) / ((1 - lmbda) * p_lm + lmbda * p_knn)
        want = (slope.gather(1, tokens) * upstream.double()).sum(1)
        torch.testing.assert_close(gradient(torch.float32), want, rtol=2e-5, atol=2e-5)


def test_a_number_beside_a_tensor_stays_the_number_it_is() -> None:
    distances, tokens = torch.rand(3, 8), torch.randint(0, 50, (3, 8))
    logits = torch.randn(3, 50)
    for lmbda in (1 - 1e-6, 1 - 1e-9):
        want = knnext.knn_interpolate(logits, distances, tokens, 2.0, lmbda)
        got = knnext.knn_interpolate(logits, distances, tokens, torch.tensor(2.0), lmbda)
        assert got.isfinite().all()
        torch.testing.assert_close(got, want)


def reference_with_safe_ends(logits, distances, tokens, temperature, lmbda):
    """The mixture of probabilities, where autograd has no log 0 to stumble over."""
    p_knn = reference.knn_softmax(distances, tokens, temperature, logits.shape[1])
    weight = lmbda * (tokens >= 0).any(1, keepdim=True)
    mixed = (1 - weight) * logits.softmax(1) + weight * p_knn
    return mixed.masked_fill(mixed == 0, 1.0).log()


@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=4))[1:])
def test_any_subset_of_leaves_gets_the_same_gradient(subset) -> None:
    distances, tokens = neighbors(4, 9, 7)
    leaves = [torch.randn(4, 7), distances, torch.rand(4) + 0.5, torch.rand(()) * 0.5]

    def grads(wanted):
        args = [x.clone().requires_grad_(w) for x, w in zip(leaves, wanted, strict=True)]
        out = knnext.knn_interpolate(args[0], args[1], tokens, args[2], args[3])
        return torch.autograd.grad(out.square().sum(), [a for a in args if a.requires_grad])

    every = grads((True,) * 4)
    want = [g for g, w in zip(every, subset, strict=True) if w]
    assert all(torch.equal(g, w) for g, w in zip(grads(subset), want, strict=True))


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_gradient_of_lmbda_at_its_ends(lmbda: float) -> None:
    logits, distances = torch.zeros(2, 4), torch.tensor([[0.0, 0.0], [INF, INF]])
    tokens = torch.tensor([[1, 2], [-1, -1]])
    weight = torch.tensor([lmbda, lmbda], requires_grad=True)
    out = knnext.knn_interpolate(logits, distances, tokens, torch.tensor(1.0), weight)
    (grad,) = torch.autograd.grad(out[:, 1].sum(), weight)
    # log(0.25 (1 - l) + 0.5 l): 0.25 / m; without a neighbor lmbda plays no part.
    assert grad.tolist() == pytest.approx([0.25 / (0.25 * (1 - lmbda) + 0.5 * lmbda), 0.0])


def test_masked_logits_and_a_picked_target_give_no_nan() -> None:
    distances, tokens = neighbors(4, 9, 7)
    logits = torch.randn(4, 7)
    logits[:, 3:5] = -INF
    tokens[tokens == 3] = 2
    leaves = [logits, distances, torch.tensor(1.0), torch.tensor(0.3)]
    x, d, t, lmbda = (a.requires_grad_() for a in leaves)
    out = knnext.knn_interpolate(x, d, tokens, t, lmbda)
    grads = torch.autograd.grad(out[:, 0].sum(), (x, d, t, lmbda))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, 3:5] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_logits_come_in_half(dtype: torch.dtype) -> None:
    distances, tokens = neighbors(3, 9, 7)
    logits = torch.randn(3, 7).to(dtype).requires_grad_()
    out = knnext.knn_interpolate(logits, distances, tokens, 1.0, 0.3)
    (grad,) = torch.autograd.grad(out[:, 0].sum(), logits)
    wide = logits.detach().float().requires_grad_()
    out = knnext.knn_interpolate(wide, distances, tokens, 1.0, 0.3)
    (want,) = torch.autograd.grad(out[:, 0].sum(), wide)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, want.to(dtype))


X, D, T = torch.randn(3, 9), torch.rand(3, 4), torch.zeros(3, 4, dtype=torch.int64)
ONE = torch.tensor(1.0)
BAD = {
    "logits dtype": (X.long(), D, T, 1.0, 0.5, "lm_logits must be a float16, bfloat16, float32"),
    "logits shape": (X[0], D, T, 1.0, 0.5, "of shape (3, V), got a float32 tensor of shape (9,)"),
    "logits rows": (X[:2], D, T, 1.0, 0.5, "got a float32 tensor of shape (2, 9)"),
    "no vocabulary": (X[:, :0], D, T, 1.0, 0.5, "lm_logits must have V >= 1"),
    "distances": (X, D.half(), T, 1.0, 0.5, "distances must be a float32 or float64 tensor"),
    "tokens": (X, D, T[1:], 1.0, 0.5, "tokens must be an int64 or int32 tensor of shape (3, 4)"),
    "temperature": (X, D, T, -1.0, 0.5, "temperature must be a finite number above 0, got -1"),
    "lmbda above": (X, D, T, 1.0, 1.5, "lmbda must lie in [0, 1], got 1.5"),
    "lmbda below": (X, D, T, 1.0, -0.5, "lmbda must lie in [0, 1], got -0.5"),
    "lmbda nan": (X, D, T, 1.0, NAN, "lmbda must lie in [0, 1], got nan"),
    "lmbda rows": (X, D, T, ONE, torch.ones(4), "lmbda must be a number or a float16"),
    "temperature rows": (X, D, T, torch.ones(1), ONE, "of shape () or (3,), got a float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_alike_by_real_and_fake_tensors(name: str) -> None:
    *args, match = BAD[name]
    assert_refused(knnext.knn_interpolate, match, *args)


@pytest.mark.parametrize("bad", [9, -2, (1 << 32) + 5])
def test_a_token_outside_the_vocabulary_is_named(bad: int) -> None:
    tokens = T.clone()
    tokens[1, 3] = bad
    with pytest.raises(RuntimeError, match=rf"in \[-1, V\) with V = 9, got {bad} in row 1"):
        knnext.knn_interpolate(X, D, tokens, 1.0, 0.5)


@pytest.mark.parametrize("bad", [-0.1, 1.1, NAN])
def test_a_bad_lmbda_in_a_tensor_is_named(bad: float) -> None:
    with pytest.raises(RuntimeError, match=rf"lmbda must lie in \[0, 1\], got {bad:g} in row 2"):
        knnext.knn_interpolate(X, D, T, 1.0, torch.tensor([0.0, 1.0, bad]))


def test_opcheck() -> None:
    distances, tokens = neighbors(3, 6, 5)
    x = torch.randn(3, 5, requires_grad=True)
    for d in (distances.requires_grad_(), distances.detach().double().requires_grad_()):
        torch.library.opcheck(OP.default, (x, d, tokens, 0.7, 0.3))
        for shape in ((), (3,)):
            t, lmbda = torch.rand(shape) + 0.5, torch.rand(shape) * 0.9
            args = (x, d, tokens, t.requires_grad_(), lmbda.requires_grad_())
            torch.library.opcheck(OP.tensor, args)


def test_compiles_as_one_graph_with_its_gradient() -> None:
    def make(rows: int) -> list[torch.Tensor]:
        distances, tokens = neighbors(rows, 8, 11)
        lmbda = torch.full((rows,), 0.4, requires_grad=True)
        logits = torch.randn(rows, 11, requires_grad=True)
        return [logits, distances.requires_grad_(), tokens, lmbda]

    def by_tensor(x, d, t, lmbda):
        return knnext.knn_interpolate(x, d, t, 2.0, lmbda).square().sum()

    def by_number(x, d, t, lmbda):
        return knnext.knn_interpolate(x, d, t, 2.0, 0.4).square().sum() + 0 * lmbda.sum()

    assert_compiles(by_tensor, make)
    assert_compiles(by_number, make)
