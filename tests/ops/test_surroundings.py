"""What others set for the whole process, and numbers as NumPy and torch have them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import knnext
from knnext import reference, testing
from knnext.ops import _gradients, _tangents

D = torch.tensor([[0.5, 1.0, float("inf")], [0.25, 0.75, 2.0]])
TOKENS = torch.tensor([[0, 2, -1], [1, 1, 3]])
TARGETS, X = torch.tensor([2, 1]), torch.linspace(-2, 2, 8).reshape(2, 4)
T, L = torch.tensor([0.7, 1.3]), torch.tensor(0.3)
Q, KEYS = torch.linspace(0, 3, 8).reshape(2, 4), torch.linspace(-1, 2, 20).reshape(5, 4)
INDICES = torch.tensor([[4, 0, -1], [1, 1, 2]])


def of(module: Any) -> dict[str, Callable[[], Any]]:
    """Each op as this module has it; a number beside a tensor among the parameters too."""
    return {
        "softmax": lambda: module.knn_softmax(D, TOKENS, 0.7, 4),
        "softmax t": lambda: module.knn_softmax(D, TOKENS, T, 4),
        "mixture": lambda: module.knn_interpolate(X, D, TOKENS, 0.7, 0.3),
        "mixture t": lambda: module.knn_interpolate(X, D, TOKENS, T, 0.3),
        "mixture l": lambda: module.knn_interpolate(X.half(), D, TOKENS, 0.7, L),
        "target": lambda: module.knn_target_log_prob(D, TOKENS, TARGETS, T),
        "search": lambda: module.knn_search(Q, KEYS, 6, refine=True),
        "search half": lambda: module.knn_search(Q.half(), KEYS.half(), 2, "ip", index_offset=3),
        "search on": lambda: module.knn_search(
            Q, KEYS, 2, init_distances=D, init_indices=INDICES, key_sqnorms=KEYS.square().sum(1)
        ),
        "norms": lambda: module.key_sqnorms(KEYS.bfloat16()),
        "rescore": lambda: module.rescore(Q, KEYS, INDICES),
        "rescore none": lambda: module.rescore(Q, KEYS[:0], INDICES.clamp_max(-1)),
        "merge": lambda: module.merge_topk(D, INDICES, 5),
        "tokens": lambda: module.gather_tokens(TARGETS, TOKENS.clamp_max(1)),
        "no tokens": lambda: module.gather_tokens(TARGETS[:0], TOKENS.clamp_max(-1)),
    }


def gradients(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    out = function(*leaves)
    (first, *rest) = torch.autograd.grad(out[out.isfinite()].sum(), leaves, create_graph=True)
    return [first, *rest, *torch.autograd.grad(first.square().sum(), leaves[0])]


def mixture(x: Tensor, d: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return knnext.knn_interpolate(x, d, TOKENS, t, w)


RUNS: dict[str, Callable[[], Any]] = {
    **of(knnext),
    **{f"reference {name}": run for name, run in of(reference).items()},
    "gradients": lambda: gradients(mixture, X, D, T, L),
    "gradients rescore": lambda: gradients(lambda q, x: knnext.rescore(q, x, INDICES), Q, KEYS),
    "tangents": lambda: torch.func.jvp(mixture, (X, D, T, L), (X, D * 0, T, L)),
    "samples": lambda: torch.vmap(lambda q: knnext.knn_search(q, KEYS, 2))(Q[None]),
    "plain gradients": lambda: _gradients.knn_interpolate(
        X, X, D, TOKENS, mixture(X, D, T, L), 0.7, 0.3, True, True
    ),
    "plain tangents": lambda: _tangents.rescore(Q, KEYS[:0], INDICES * 0 - 1, "l2", Q, None),
    "true distances": lambda: testing.true_distances(Q, KEYS),
    "checked": lambda: testing.assert_search(knnext.knn_search(Q, KEYS, 2), Q, KEYS, 2),
    "compared": lambda: testing.assert_close(D, D + 1e-7, "direct", 1.0),
    "topk": lambda: testing.assert_topk_close((D, INDICES), (D, INDICES), 1e-3),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", RUNS)
def test_a_setting_of_the_process_changes_no_bit(name: str, setting: str) -> None:
    want = RUNS[name]()
    with SETTINGS[setting](), warnings.catch_warnings():
        warnings.simplefilter("error")
        got = RUNS[name]()
    assert_same(got, want)


def assert_same(got: Any, want: Any) -> None:
    if not isinstance(want, Tensor):
        for g, w in zip(got or (), want or (), strict=True):
            assert_same(g, w)
        return
    assert got.dtype == want.dtype and got.device == want.device
    assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", of(knnext))
def test_fake_tensors_of_any_default_are_as_the_real_ones(name: str, setting: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    want = RUNS[name]()
    with SETTINGS[setting](), FakeTensorMode(allow_non_fake_inputs=True):
        got = RUNS[name]()
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for g, w in pairs:
        assert (g.shape, g.dtype, g.device) == (w.shape, w.dtype, w.device)


# Numbers


INTEGERS = [np.int64(3), np.int32(3), np.uint8(3), torch.tensor(3), np.array(3)]
NO_INTEGERS = [True, np.True_, 3.0, np.float64(3), "3", None, torch.tensor(3.0), torch.tensor(True)]


@pytest.mark.parametrize("three", INTEGERS, ids=lambda x: type(x).__name__)
def test_integers_of_any_make(three: Any) -> None:
    assert_same(knnext.knn_search(Q, KEYS, three), knnext.knn_search(Q, KEYS, 3))
    moved = knnext.knn_search(Q, KEYS, 2, index_offset=three)
    assert_same(moved, knnext.knn_search(Q, KEYS, 2, index_offset=3))
    assert_same(knnext.merge_topk(D, INDICES, three), knnext.merge_topk(D, INDICES, 3))
    tokens = TOKENS.clamp_max(2)
    assert_same(knnext.knn_softmax(D, tokens, 1.0, three), knnext.knn_softmax(D, tokens, 1.0, 3))


@pytest.mark.parametrize("bad", NO_INTEGERS, ids=repr)
def test_what_is_no_integer_is_named(bad: Any) -> None:
    for match, run in {
        r"knnext::knn_search: k must be an integer, got": lambda: knnext.knn_search(Q, KEYS, bad),
        r"knn_search: index_offset must be an integer": lambda: knnext.knn_search(
            Q, KEYS, 2, index_offset=bad
        ),
        r"knnext::merge_topk: k must be an integer": lambda: knnext.merge_topk(D, INDICES, bad),
        r"knn_softmax: vocab_size must be an int": lambda: knnext.knn_softmax(D, TOKENS, 1.0, bad),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            run()


HALVES = [np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2), np.array(0.5)]


@pytest.mark.parametrize("half", HALVES, ids=lambda x: type(x).__name__)
def test_numbers_of_any_make(half: Any) -> None:
    assert_same(knnext.knn_softmax(D, TOKENS, half, 4), knnext.knn_softmax(D, TOKENS, 0.5, 4))
    want = knnext.knn_interpolate(X, D, TOKENS, 0.5, 0.5)
    assert_same(knnext.knn_interpolate(X, D, TOKENS, half, half), want)
    beside = knnext.knn_interpolate(X, D, TOKENS, torch.tensor(0.5), half)
    torch.testing.assert_close(beside, want)
    want = knnext.knn_target_log_prob(D, TOKENS, TARGETS, 0.5)
    assert_same(knnext.knn_target_log_prob(D, TOKENS, TARGETS, half), want)


@pytest.mark.parametrize("one", [1, np.int64(1), torch.tensor(1.0), np.float32(1)], ids=repr)
def test_whole_numbers_are_numbers(one: Any) -> None:
    want = knnext.knn_softmax(D, TOKENS, 1.0, 4)
    torch.testing.assert_close(knnext.knn_softmax(D, TOKENS, one, 4), want)
    want = knnext.knn_interpolate(X, D, TOKENS, 1.0, 1.0)
    torch.testing.assert_close(knnext.knn_interpolate(X, D, TOKENS, one, one), want)


@pytest.mark.parametrize("bad", [True, np.False_, "1.0", None, 1j, [0.5]], ids=repr)
def test_what_is_no_number_is_named(bad: Any) -> None:
    with pytest.raises(RuntimeError, match="knn_softmax: temperature must be a number or"):
        knnext.knn_softmax(D, TOKENS, bad, 4)
    with pytest.raises(RuntimeError, match="knn_target_log_prob: temperature must be a number or"):
        knnext.knn_target_log_prob(D, TOKENS, TARGETS, bad)
    with pytest.raises(RuntimeError, match="knn_interpolate: lmbda must be a number or"):
        knnext.knn_interpolate(X, D, TOKENS, T, bad)


def test_one_number_on_another_device_comes_to_the_distances() -> None:
    d, tokens, x = D.to("meta"), TOKENS.to("meta"), X.to("meta")  # stands for a GPU
    t = torch.tensor(0.5, requires_grad=True)
    assert knnext.knn_softmax(d, tokens, t, 4).is_meta
    assert knnext.knn_interpolate(x, d, tokens, t, torch.tensor(0.5)).is_meta
    assert knnext.knn_target_log_prob(d, tokens, TARGETS.to("meta"), t).is_meta
    with pytest.raises(RuntimeError, match="temperature must be on the device of distances, meta"):
        knnext.knn_softmax(d, tokens, torch.ones(2), 4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiler_takes_numbers_too(dynamic: bool) -> None:
    def step(q: Tensor, d: Tensor, tokens: Tensor, t: float) -> tuple[Tensor, ...]:
        k = q.shape[0] + 1
        p = knnext.knn_softmax(d, tokens, t * 2, q.shape[0] + 2)
        return *knnext.knn_search(q, KEYS, k), *knnext.merge_topk(d, tokens, k), p

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, t in ((2, 0.5), (3, 0.75)):
        args = (torch.rand(rows, 4), torch.rand(rows, 3), torch.zeros(rows, 3).long(), t)
        assert_same(compiled(*args), step(*args))
