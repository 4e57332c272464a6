"""The CUDA kernels of the gradients on the host emulator, against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from knnext import reference
from knnext.ops import _gradients
from knnext.testing import assert_close
from tests.emulator import ops
from tests.emulator.build import call, compiler_found, load

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")
INF, NAN = float("inf"), float("nan")


def neighbors(rows: int, k: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Ascending distances, tokens of which a few come often, and some padding."""
    distances = (torch.rand(rows, k) * 30).sort(1).values + 100
    pool = torch.randint(0, vocab_size, (max(1, k // 4),))
    tokens = pool[(torch.rand(rows, k) ** 2 * len(pool)).long()]
    tokens[:, k - k // 8 :] = -1
    distances[:, k - k // 8 :] = INF
    return distances, tokens


def wide(value: object) -> object:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value  # type: ignore[union-attr]


def assert_gradients(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Each row by its own largest value: a row of small gradients must be right too.

    Those of parameters are sums over a row, in which large terms may cancel.
    """
    for g, w in zip(got, want, strict=True):
        if w.numel():
            scale = w.abs().nan_to_num(nan=0.0, posinf=0.0)
            scale = scale.amax(1, keepdim=True) if w.dim() == 2 else scale.amax().clamp_min(1.0)
            assert_close(g, w, "gradient", scale)
        else:
            assert g.shape == w.shape


def interpolate_gradients(grad, logits, distances, tokens, temperature, lmbda, **options):
    """(the kernel's, those of float64), from the mixture in float64."""
    args = (logits.double(), distances.double(), tokens, wide(temperature), wide(lmbda))
    mixed = reference.knn_interpolate(*args)
    needs = options.pop("needs", (True, True))
    got = ops.knn_interpolate_gradients(
        grad, logits, distances, tokens, mixed.float(), temperature, lmbda, *needs, **options
    )
    want = _gradients.knn_interpolate(
        grad.double(), args[0], args[1], tokens, mixed, *args[3:], *needs
    )
    return got, want


SHAPES = [
    (3, 1, 1),
    (3, 1, 7),
    (2, 65, 33),
    (2, 127, 5003),
    (2, 1024, 33_344),
    (1, 2049, 1001),
    (1, 300, 50_257),
]


@pytest.mark.parametrize(("rows", "k", "vocab_size"), SHAPES)
def test_softmax(rows: int, k: int, vocab_size: int) -> None:
    distances, tokens = neighbors(rows, k, vocab_size)
    grad = torch.randn(rows, vocab_size)
    got = ops.knn_softmax_gradients(grad, distances, tokens.int(), 2.5)
    want = _gradients.knn_softmax(grad.double(), distances.double(), tokens, 2.5)
    assert_gradients(got, want)


@pytest.mark.parametrize("k", [1, 64, 1025])
def test_target(k: int) -> None:
    distances, tokens = neighbors(4, k, 50)
    targets = torch.stack([tokens[0, 0], tokens[1, k // 2], torch.tensor(51), torch.tensor(-1)])
    temperature, grad = torch.tensor([0.5, 1.0, 2.0, 3.0]), torch.randn(4)
    log_p = reference.knn_target_log_prob(distances.double(), tokens, targets, temperature)
    want = _gradients.knn_target_log_prob(
        grad.double(), distances.double(), tokens, targets, log_p, temperature.double()
    )
    got = ops.knn_target_log_prob_gradients(
        grad, distances, tokens, targets, log_p.float(), temperature
    )
    assert_gradients(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "k", "vocab_size"), SHAPES)
def test_interpolate(rows: int, k: int, vocab_size: int, dtype: torch.dtype) -> None:
    if vocab_size > 10_000 and dtype in (torch.bfloat16, torch.float64):
        pytest.skip("the same path as in a smaller vocabulary")
    distances, tokens = neighbors(rows, k, vocab_size)
    logits = (torch.randn(rows, vocab_size) * 4).to(dtype)
    grad = torch.randn(rows, vocab_size)
    (x, *got), (want_x, *want) = interpolate_gradients(grad, logits, distances, tokens, 2.5, 0.3)
    assert_gradients(tuple(got), tuple(want))
    if dtype in (torch.float32, torch.float64):
        assert_gradients((x,), (want_x,))
    else:
        assert x.dtype == dtype
        torch.testing.assert_close(x, want_x.to(dtype), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("lmbda", [0.0, 1e-4, 0.25, 0.999, 1.0])
def test_the_gradient_of_one_target(lmbda: float) -> None:
    distances, tokens = neighbors(3, 100, 40)
    logits, grad = torch.randn(3, 40) * 6, torch.zeros(3, 40)
    grad[torch.arange(3), tokens[:, 0]] = -1.0
    assert_gradients(*interpolate_gradients(grad, logits, distances, tokens, 2.0, lmbda))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_what_is_not_needed_changes_nothing_else(needs: tuple[bool, bool]) -> None:
    distances, tokens = neighbors(3, 100, 1003)
    logits, grad = torch.randn(3, 1003), torch.randn(3, 1003)
    args = (grad, logits, distances, tokens, 2.0, 0.4)
    whole, part = (interpolate_gradients(*args, needs=n)[0] for n in ((True, True), needs))
    for w, p, kept in zip(whole, part, (needs[0], True, True, needs[1]), strict=True):
        assert torch.equal(p, w) if kept else p.shape[0] == 0


@pytest.mark.parametrize("vocab_size", [1, 5, 9, 17, 63, 1003])
@pytest.mark.parametrize("skew", [0, 1, 3, 4])
def test_rows_that_begin_anywhere(vocab_size: int, skew: int) -> None:
    distances, tokens = neighbors(5, 30, vocab_size)
    logits = torch.randn(5, vocab_size + 13)[:, skew : skew + vocab_size]
    grad = torch.randn(5, vocab_size + 4)[:, skew % 4 : vocab_size + skew % 4]
    assert_gradients(
        *interpolate_gradients(grad, logits, distances, tokens, 2.0, 0.6, skew=skew % 4)
    )


def test_rows_and_bits_longer_than_shared_memory() -> None:
    distances, tokens = neighbors(2, 100, 20_011)
    logits, grad = torch.randn(2, 20_011) * 3, torch.randn(2, 20_011)
    call(load().emulate_set_shared_limit, 40 * 1024)
    try:
        cut = interpolate_gradients(grad, logits, distances, tokens, 2.0, 0.5)
        call(load().emulate_set_shared_limit, 6 * 1024)  # no room for the bits
        outside = interpolate_gradients(grad, logits, distances, tokens, 2.0, 0.5)
    finally:
        call(load().emulate_set_shared_limit, 227 * 1024)
    whole = interpolate_gradients(grad, logits, distances, tokens, 2.0, 0.5)
    for got, want in (cut, outside):
        assert_gradients(got, want)
        assert all(torch.equal(g, w) for g, w in zip(got, whole[0], strict=True))


@pytest.mark.slow
def test_many_rows_take_smaller_blocks() -> None:
    distances, tokens = neighbors(256, 5, 19)
    logits, grad = torch.randn(256, 19), torch.randn(256, 19)
    assert_gradients(*interpolate_gradients(grad, logits, distances, tokens, 2.0, 0.5))


def test_any_order_of_threads_gives_the_same_bits() -> None:
    distances, tokens = neighbors(2, 700, 3001)
    logits, grad = torch.randn(2, 3001).half(), torch.randn(2, 3001)
    args = (grad, logits, distances, tokens, 2.0, 0.4)
    first = interpolate_gradients(*args, seed=0)[0]
    for seed in (1, 2, 3):
        again = interpolate_gradients(*args, seed=seed)[0]
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parameters_by_row(dtype: torch.dtype) -> None:
    distances, tokens = neighbors(3, 20, 11)
    temperature = torch.tensor([0.5, 2.0, 64.0], dtype=dtype)
    lmbda = torch.tensor([0.0, 0.25, 0.75], dtype=dtype)
    logits, grad = torch.randn(3, 11), torch.randn(3, 11)
    assert_gradients(*interpolate_gradients(grad, logits, distances, tokens, temperature, lmbda))


def test_rows_without_a_neighbor_and_rows_of_nan() -> None:
    distances, tokens = neighbors(3, 20, 9)
    tokens[1], distances[2, 3] = -1, NAN
    logits, grad = torch.randn(3, 9), torch.randn(3, 9)
    got, want = interpolate_gradients(grad, logits, distances, tokens, 1.0, 0.5)
    assert_gradients(tuple(g[:2] for g in got), tuple(w[:2] for w in want))
    assert (got[1][1] == 0).all() and got[2][1] == 0 and got[3][1] == 0
    assert all(g[2].isnan().all() for g in got)
    softmax = ops.knn_softmax_gradients(grad, distances, tokens, 1.0)
    assert all((g[1] == 0).all() and g[2].isnan().all() for g in softmax)


@pytest.mark.parametrize("lmbda", [0.0, 0.3])
def test_masked_logits_give_no_nan(lmbda: float) -> None:
    distances, tokens = neighbors(4, 9, 7)
    logits, grad = torch.randn(4, 7), torch.zeros(4, 7)
    logits[:, 3:5], grad[:, 0] = -INF, 1.0
    tokens[tokens == 3] = 2
    got, want = interpolate_gradients(grad, logits, distances, tokens, 1.0, lmbda)
    assert all(g.isfinite().all() for g in got[:3])
    assert_gradients(got[:3], want[:3])
    assert (got[0][:, 3:5] == 0).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "dim"), [(1, 1), (300, 7), (20, 129), (5, 256)])
def test_rescore(m: int, dim: int, dtype: torch.dtype, metric: str) -> None:
    queries, keys = torch.randn(6, dim).to(dtype), torch.randn(40, dim).to(dtype)
    indices, grad = torch.randint(-1, 35, (6, m)), torch.randn(6, m)
    grad[0, 0], order = 0.0, indices.reshape(-1).sort(stable=True).indices
    got = ops.rescore_gradients(grad, queries, keys, indices, order, metric)
    want = _gradients.rescore(
        grad.double(), queries.double(), keys.double(), indices, order, metric, True
    )
    for g, w in zip(got, want, strict=True):
        if dtype == torch.float32:
            assert_close(g, w, "gradient", w.abs().max().item())
        else:
            torch.testing.assert_close(g, w.to(dtype), rtol=2e-2, atol=2e-2)
    other = ops.rescore_gradients(grad, queries, keys, indices, order, metric, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True))
    assert ops.rescore_gradients(grad, queries, keys, indices, None, metric)[1].shape == (0, dim)
    assert (got[1][35:] == 0).all()


def test_rescore_of_views_and_of_what_weighs_nothing() -> None:
    keys = torch.randn(9, 12)[:, 2:9]
    keys[3] = INF
    queries, indices = torch.randn(4, 14)[::2, 5:12], torch.tensor([[3, 8, -1], [8, 0, 8]])
    grad = torch.tensor([[0.0, 1.0, NAN], [2.0, 3.0, 4.0]])
    order = indices.reshape(-1).sort(stable=True).indices
    got = ops.rescore_gradients(grad, queries, keys, indices, order)
    want = _gradients.rescore(grad, queries, keys, indices, order, "l2", True)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, "gradient", w.abs().max().item())


def test_an_index_out_of_range_stops_the_kernel() -> None:
    indices = torch.tensor([[1, 9]])
    with pytest.raises(RuntimeError, match="an index is not in"):
        ops.rescore_gradients(torch.ones(1, 2), torch.randn(1, 3), torch.randn(9, 3), indices, None)


@pytest.fixture(autouse=True)
def _shared_memory() -> Iterator[None]:
    yield
    call(load().emulate_set_shared_limit, 227 * 1024)
