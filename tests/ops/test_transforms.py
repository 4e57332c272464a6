"""Derivatives by every road: reverse, forward, torch.func and its compositions, the compiler.

The oracle is a difference quotient of the op itself, or the reverse mode that gradcheck holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import knnext

INF = float("inf")
OPS = torch.ops.knnext
ROWS, K, V, DIM, N = 3, 6, 5, 4, 7
TOKENS = torch.tensor([[0, 1, 1, 4, -1, 2], [-1] * 6, [3, 3, 3, 0, 2, -1]])
TARGETS = torch.tensor([1, 0, 4])  # the last is nobody's token
INDICES = torch.tensor([[0, -1, 4], [2, 2, 6], [3, 0, -1]])


class Case(NamedTuple):
    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]  # all differentiable


def padded(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The distances of padding are +inf, which is no input to differentiate by."""
    return lambda d, *rest: run(d.masked_fill(TOKENS < 0, INF), *rest)


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def finite(scores: Tensor) -> Tensor:
    return scores.masked_fill(INDICES < 0, 0.0)


def log_finite(log_p: Tensor) -> Tensor:
    return log_p.masked_fill(log_p == -INF, 0.0)


D, X = 3 * numbers(ROWS, K), numbers(ROWS, V)
T, T_ROWS = numbers() + 0.5, numbers(ROWS) + 0.5
L, L_ROWS = 0.8 * numbers() + 0.1, 0.8 * numbers(ROWS) + 0.1
Q, KEYS = numbers(ROWS, DIM), numbers(N, DIM)
CASES = {
    "softmax": Case(padded(lambda d: knnext.knn_softmax(d, TOKENS, 0.7, V)), (D,)),
    "softmax bare": Case(padded(lambda d: OPS.knn_softmax(d, TOKENS, 0.7, V)), (D,)),
    "softmax t": Case(padded(lambda d, t: knnext.knn_softmax(d, TOKENS, t, V)), (D, T)),
    "softmax t rows": Case(padded(lambda d, t: OPS.knn_softmax(d, TOKENS, t, V)), (D, T_ROWS)),
    "target": Case(
        padded(lambda d: log_finite(knnext.knn_target_log_prob(d, TOKENS, TARGETS, 0.7))), (D,)
    ),
    "target t": Case(
        padded(lambda d, t: log_finite(OPS.knn_target_log_prob(d, TOKENS, TARGETS, t))), (D, T)
    ),
    "target t rows": Case(
        padded(lambda d, t: log_finite(knnext.knn_target_log_prob(d, TOKENS, TARGETS, t))),
        (D, T_ROWS),
    ),
    "mixture": Case(padded(lambda d, x: knnext.knn_interpolate(x, d, TOKENS, 0.7, 0.4)), (D, X)),
    "mixture t l": Case(
        padded(lambda d, x, t, w: OPS.knn_interpolate(x, d, TOKENS, t, w)), (D, X, T, L)
    ),
    "mixture t": Case(
        padded(lambda d, x, t: knnext.knn_interpolate(x, d, TOKENS, t, 0.4)), (D, X, T)
    ),
    "mixture rows": Case(
        padded(lambda d, x, t, w: knnext.knn_interpolate(x, d, TOKENS, t, w)),
        (D, X, T_ROWS, L_ROWS),
    ),
    "rescore l2": Case(lambda q, x: finite(knnext.rescore(q, x, INDICES)), (Q, KEYS)),
    "rescore ip": Case(lambda q, x: finite(OPS.rescore(q, x, INDICES, "ip")), (Q, KEYS)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def tangents(case: Case) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(x) for x in case.inputs)


def quotient(run: Callable[..., Tensor], inputs: tuple[Tensor, ...], v: tuple[Tensor, ...]):
    step = 1e-6
    ahead = run(*(x + step * dx for x, dx in zip(inputs, v, strict=True)))
    back = run(*(x - step * dx for x, dx in zip(inputs, v, strict=True)))
    return (ahead - back) / (2 * step)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_jvp_of_all_inputs_and_of_each(case: Case) -> None:
    v = tangents(case)
    value, tangent = jvp(case.run, case.inputs, v)
    close(value, case.run(*case.inputs))
    close(tangent, quotient(case.run, case.inputs, v))
    for i in range(len(v)):
        only = lambda x, i=i: case.run(*case.inputs[:i], x, *case.inputs[i + 1 :])  # noqa: E731
        got = jvp(only, (case.inputs[i],), (v[i],))[1]
        close(got, quotient(only, (case.inputs[i],), (v[i],)))
        assert got.abs().sum() > 0


@pytest.mark.parametrize("mode", ["grad", "no_grad", "leaves"])
def test_dual_tensors(case: Case, mode: str) -> None:
    v = tangents(case)
    leaves = [x.clone().requires_grad_(mode == "leaves") for x in case.inputs]
    with fwAD.dual_level(), torch.set_grad_enabled(mode != "no_grad"):
        out = case.run(*map(fwAD.make_dual, leaves, v))
        value, tangent = fwAD.unpack_dual(out)
        close(tangent, quotient(case.run, case.inputs, v))
        assert value.requires_grad == (mode == "leaves")
        plain = fwAD.unpack_dual(case.run(*case.inputs))
        assert plain.tangent is None


def test_forward_over_reverse_with_dual_tensors(case: Case) -> None:
    v, weight = tangents(case), torch.randn_like(case.run(*case.inputs))

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((case.run(*inputs) * weight).sum(), inputs)

    def plain(*inputs: Tensor) -> Tensor:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.cat([g.flatten() for g in gradient(*leaves)])

    with fwAD.dual_level():
        leaves = [x.clone().requires_grad_() for x in case.inputs]
        got = [fwAD.unpack_dual(g)[1] for g in gradient(*map(fwAD.make_dual, leaves, v))]
        got = torch.cat(
            [
                torch.zeros_like(x).flatten() if g is None else g.flatten()
                for g, x in zip(got, leaves, strict=True)
            ]
        )
    torch.testing.assert_close(got, quotient(plain, case.inputs, v), rtol=1e-5, atol=1e-6)


def test_vjp_grad_and_both_jacobians(case: Case) -> None:
    every = tuple(range(len(case.inputs)))
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    out = case.run(*leaves)
    weight = torch.randn_like(out)
    want = torch.autograd.grad((out * weight).sum(), leaves)
    close(vjp(case.run, *case.inputs)[1](weight), want)
    close(grad(lambda *a: (case.run(*a) * weight).sum(), argnums=every)(*case.inputs), want)
    jacobians = jacrev(case.run, argnums=every)(*case.inputs)
    close(jacfwd(case.run, argnums=every)(*case.inputs), jacobians)
    for j, w in zip(jacobians, want, strict=True):
        close(torch.tensordot(weight, j, dims=weight.dim()), w)


def test_the_functions_of_torch_autograd(case: Case) -> None:
    functional = torch.autograd.functional
    v = tangents(case)
    want = quotient(case.run, case.inputs, v)
    close(functional.jvp(case.run, case.inputs, v)[1], want)
    by_loop = functional.jacobian(case.run, case.inputs)
    close(functional.jacobian(case.run, case.inputs, vectorize=True), by_loop)
    forward = functional.jacobian(case.run, case.inputs, vectorize=True, strategy="forward-mode")
    close(forward, by_loop)


def test_hessians_agree(case: Case) -> None:
    every = tuple(range(len(case.inputs)))
    weight = torch.randn_like(case.run(*case.inputs))

    def loss(*inputs: Tensor) -> Tensor:
        return (case.run(*inputs) * weight).sum()

    want = torch.autograd.functional.hessian(loss, case.inputs)
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacrev, jacrev), (jacfwd, jacfwd)):
        close(outer(inner(loss, argnums=every), argnums=every)(*case.inputs), want)
    close(hessian(loss, argnums=every)(*case.inputs), want)
    if len(case.inputs) > 1:
        assert any(part.abs().sum() > 0 for row in want for part in row)


def test_samples_are_vectorised_with_and_without_derivatives(case: Case) -> None:
    batch = [torch.stack([x, 0.9 * x, 0.8 * x + 0.05]) for x in case.inputs]
    by_hand = torch.stack([case.run(*(x[i] for x in batch)) for i in range(3)])
    close(vmap(case.run)(*batch), by_hand)
    last = [x.movedim(0, -1) for x in batch]
    close(vmap(case.run, in_dims=-1, out_dims=-1)(*last), by_hand.movedim(0, -1))
    if len(batch) > 1:  # some inputs are common to all
        in_dims = (0,) + (None,) * (len(batch) - 1)
        got = vmap(case.run, in_dims=in_dims)(batch[0], *case.inputs[1:])
        close(got, torch.stack([case.run(x, *case.inputs[1:]) for x in batch[0]]))
    loss = lambda *a: case.run(*a).square().sum()  # noqa: E731
    want = torch.stack([grad(loss)(*(x[i] for x in batch)) for i in range(3)])
    close(vmap(grad(loss))(*batch), want)
    close(grad(lambda *a: vmap(loss)(*a).sum())(*batch), want)
    close(vmap(vmap(case.run))(*(x[None] for x in batch)), by_hand[None])


@pytest.mark.parametrize(
    "name",
    [
        "target t",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("softmax t", "mixture t l", "rescore l2")
        ),
    ],
)
def test_compiled(name: str) -> None:
    case = CASES[name]
    v = tangents(case)

    def both(*a: Tensor) -> Tensor:
        return jvp(case.run, a[: len(v)], a[len(v) :])[1]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    close(compiled(*case.inputs, *v), both(*case.inputs, *v))
    loss = grad(lambda *a: case.run(*a).square().sum())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(compiled(*case.inputs), loss(*case.inputs))


def test_functionalized_and_linearized(case: Case) -> None:
    close(torch.func.functionalize(case.run)(*case.inputs), case.run(*case.inputs))
    v = tangents(case)
    value, at = torch.func.linearize(case.run, *case.inputs)
    close(value, case.run(*case.inputs))
    close(at(*v), quotient(case.run, case.inputs, v))


# At the edges


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_mixture_at_both_ends_of_lmbda(weight: float) -> None:
    d, w = D.masked_fill(TOKENS < 0, INF)[[0]], torch.tensor(weight, dtype=torch.float64)
    tokens = TOKENS[[0]]
    run = lambda x, d, t, w: log_finite(knnext.knn_interpolate(x, d, tokens, t, w))  # noqa: E731
    inputs = (X[[0]], d, T, w)
    for i in range(3):
        v = [torch.randn_like(x) if j == i else torch.zeros_like(x) for j, x in enumerate(inputs)]
        v[1] = v[1].masked_fill(tokens < 0, 0.0)
        got = jvp(run, inputs, tuple(v))[1]
        close(got, quotient(run, (*inputs[:3], w), tuple(v)))
    if weight == 0:  # one-sided: 1 - lmbda grows as lmbda falls below
        got = jvp(lambda w: run(*inputs[:3], w), (w,), (torch.ones_like(w),))[1]
        step = 1e-7
        close_by = (run(*inputs[:3], w + step) - run(*inputs[:3], w)) / step
        torch.testing.assert_close(got, close_by, rtol=1e-4, atol=1e-4)
        by_torch = torch.autograd.functional.jvp(
            lambda w: run(*inputs[:3], w), w, torch.ones_like(w)
        )[1]
        close(by_torch, got)


def test_a_nan_spoils_its_row_and_no_other() -> None:
    d = D.masked_fill(TOKENS < 0, INF).clone()
    d[2, 1] = float("nan")
    v = torch.ones_like(d)
    for run in (
        lambda d: knnext.knn_softmax(d, TOKENS, 0.7, V),
        lambda d: knnext.knn_interpolate(X, d, TOKENS, 0.7, 0.5),
    ):
        tangent = jvp(run, (d,), (v,))[1]
        assert tangent[2].isnan().all() and tangent[:2].isfinite().all()


@pytest.mark.parametrize("k", [0, 1])
def test_few_or_no_neighbors_and_no_rows(k: int) -> None:
    for rows in (0, 2):
        d, tokens = torch.rand(rows, k), torch.zeros(rows, k, dtype=torch.int64)
        t = torch.tensor(2.0)
        for run in (
            lambda d, t: knnext.knn_softmax(d, tokens, t, 3),  # noqa: B023
            lambda d, t: knnext.knn_interpolate(torch.zeros(rows, 3), d, tokens, t, 0.5),  # noqa: B023
            lambda d, t: knnext.knn_target_log_prob(d, tokens, torch.zeros(rows).long(), t),  # noqa: B023
        ):
            tangent = jvp(run, (d, t), (torch.ones_like(d), torch.ones_like(t)))[1]
            assert tangent.shape == run(d, t).shape and (tangent == 0).all()
    for keys in (torch.rand(0, 4), torch.rand(3, 4)):
        indices = torch.full((2, 3), -1)
        run = lambda q: knnext.rescore(q, keys, indices)  # noqa: B023, E731
        assert (jvp(run, (torch.rand(2, 4),), (torch.ones(2, 4),))[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tangents_have_the_dtype_of_the_output(dtype: torch.dtype) -> None:
    x, d = X.to(dtype), D.float().masked_fill(TOKENS < 0, INF)
    out, tangent = jvp(
        lambda x: knnext.knn_interpolate(x, d, TOKENS, T, 0.5), (x,), (torch.ones_like(x),)
    )
    assert out.dtype == tangent.dtype == torch.float32
    q = Q.to(dtype)
    run = lambda q: knnext.rescore(q, KEYS.to(dtype), INDICES)  # noqa: E731
    out, tangent = jvp(run, (q,), (torch.ones_like(q),))
    assert out.dtype == tangent.dtype == torch.float32
    assert grad(lambda q: finite(run(q)).sum())(q).dtype == dtype


def test_bad_arguments_are_named_under_a_transform() -> None:
    with pytest.raises(RuntimeError, match=r"knnext::knn_softmax: tokens must .*of shape \(6,\)"):
        vmap(lambda d, t: knnext.knn_softmax(d, t, 1.0, V))(D[None], TOKENS[:1])
    with pytest.raises(RuntimeError, match="knnext::knn_softmax: tokens must lie in"):
        jvp(lambda d: knnext.knn_softmax(d, TOKENS + V, 1.0, V), (D,), (D,))
    with pytest.raises(RuntimeError, match="knnext::rescore: indices must lie in"):
        vmap(lambda q, x: knnext.rescore(q, x, INDICES + 2))(Q[None], KEYS[None])
