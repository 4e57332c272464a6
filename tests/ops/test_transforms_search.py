"""Ops that choose: no derivative goes through them, and searches of samples run one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import knnext

OPS = torch.ops.knnext
generator = torch.Generator().manual_seed(0)
Q, KEYS = torch.rand(3, 4, generator=generator), torch.rand(7, 4, generator=generator)
D = 3 * torch.rand(3, 6, generator=generator)
TOKENS = torch.tensor([[0, 1, 1, 4, -1, 2], [-1] * 6, [3, 3, 3, 0, 2, -1]])
INDICES = torch.tensor([[0, -1, 4], [2, 2, 6], [3, 0, -1]])

SEARCHES = {
    "knn_search": (lambda q: knnext.knn_search(q, KEYS, 3)[0], Q),
    "knn_search keys": (lambda x: OPS.knn_search(Q, x, 3, "ip")[0], KEYS),
    "knn_search init": (
        lambda d: knnext.knn_search(Q, KEYS, 3, init_distances=d, init_indices=INDICES)[0],
        Q[:, :3],
    ),
    "merge_topk": (lambda d: knnext.merge_topk(d, TOKENS, 2)[0], D),
    "key_sqnorms": (lambda x: OPS.key_sqnorms(x), KEYS),
}
ROADS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": lambda run, x: jvp(run, (x,), (torch.ones_like(x),)),
    "grad": lambda run, x: grad(lambda x: run(x).sum())(x),
    "vjp": lambda run, x: vjp(run, x)[1](torch.ones_like(run(x))),
    "jacfwd": lambda run, x: jacfwd(run)(x),
    "jacrev": lambda run, x: jacrev(run)(x),
    "hessian": lambda run, x: hessian(lambda x: run(x).sum())(x),
    "vmap of grad": lambda run, x: vmap(grad(lambda x: run(x).sum()))(x[None]),
    "dual": lambda run, x: dual(run, x),
}


def dual(run: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with fwAD.dual_level():
        return fwAD.unpack_dual(run(fwAD.make_dual(x, torch.ones_like(x))))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", SEARCHES)
def test_an_op_without_a_derivative_says_so(name: str, road: str) -> None:
    run, x = SEARCHES[name]
    message = f"knnext::{name.split()[0]}: no derivative goes through this op"
    with pytest.raises(RuntimeError, match=message):
        ROADS[road](run, x)
    ROADS[road](lambda x: run(x.detach()) + x.sum(), x)


def test_a_search_inside_what_is_differentiated() -> None:
    def loss(q: Tensor, search: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.logsumexp(-knnext.rescore(q, KEYS, search(q)), 1).sum()

    leaf = Q.clone().requires_grad_()
    search = lambda q: knnext.knn_search(q, KEYS, 3)[1]  # noqa: E731
    (want,) = torch.autograd.grad(loss(leaf, search), leaf)
    torch.testing.assert_close(grad(loss)(Q, search), want)
    search = lambda q: knnext.knn_search(q.detach(), KEYS, 3)[1]  # noqa: E731
    v = torch.randn_like(Q)
    torch.testing.assert_close(jvp(lambda q: loss(q, search), (Q,), (v,))[1], (want * v).sum())


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 2)])
def test_searches_of_samples(in_dims: tuple[int | None, int | None]) -> None:
    q, keys = torch.randn(3, 5, 4), torch.randn(3, 9, 4)
    many = [x if dim is not None else x[0] for x, dim in zip((q, keys), in_dims, strict=True)]
    given = [x if dim is None else x.movedim(0, dim) for x, dim in zip(many, in_dims, strict=True)]

    def run(q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        norms = knnext.key_sqnorms(keys)
        first = knnext.knn_search(q, keys[:4], 3, key_sqnorms=norms[:4])
        rest = {"init_distances": first[0], "init_indices": first[1]}
        return knnext.knn_search(q, keys[4:], 3, index_offset=4, refine=True, **rest)

    got = vmap(run, in_dims=in_dims)(*given)
    for i in range(3):
        each = [x[i] if dim is not None else x for x, dim in zip(many, in_dims, strict=True)]
        want = run(*each)
        assert torch.equal(got[1][i], want[1])
        torch.testing.assert_close(got[0][i], want[0])


def test_merges_and_tokens_of_samples() -> None:
    d, indices = torch.rand(4, 3, 6), torch.randint(-1, 9, (4, 3, 6))
    values = torch.arange(10, 19)
    got = vmap(lambda d, i: knnext.merge_topk(d, i, 2))(d, indices)
    tokens = vmap(lambda i: knnext.gather_tokens(values, i))(indices)
    for i in range(4):
        want = knnext.merge_topk(d[i], indices[i], 2)
        assert torch.equal(got[0][i], want[0]) and torch.equal(got[1][i], want[1])
        assert torch.equal(tokens[i], knnext.gather_tokens(values, indices[i]))
    some = vmap(lambda v: knnext.gather_tokens(v, indices[0]))(torch.stack([values, values + 1]))
    assert torch.equal(some[1], knnext.gather_tokens(values + 1, indices[0]))


@pytest.mark.parametrize(
    ("run", "inner"),
    [
        (lambda q, x: knnext.knn_search(q, x, 2), ((3, 2), (3, 2))),
        (lambda q, x: knnext.rescore(q, x, torch.tensor([[0, -1]] * 3)), ((3, 2),)),
        (lambda q, x: knnext.key_sqnorms(x), ((5,),)),
        (lambda q, x: knnext.merge_topk(q, torch.full(q.shape, -1), 1), ((3, 1), (3, 1))),
    ],
)
def test_no_samples(run: Any, inner: tuple[tuple[int, ...], ...]) -> None:
    got = vmap(run, in_dims=(0, 1))(torch.zeros(0, 3, 4), torch.zeros(5, 0, 4))
    got = (got,) if isinstance(got, torch.Tensor) else got
    assert [tuple(x.shape) for x in got] == [(0, *shape) for shape in inner]
