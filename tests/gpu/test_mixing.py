"""The mixing ops on a GPU, held to the float64 reference and to the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import knnext
from knnext import reference
from tests.gpu.runs import (
    assert_kept_to_a_side_stream,
    assert_replays,
    assert_same_bits_a_hundred_times,
)

pytestmark = pytest.mark.gpu
INF, NAN = float("inf"), float("nan")
CLOSE = {"rtol": 5e-6, "atol": 5e-6}
LOGITS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _needs_the_kernels() -> None:
    from knnext.ops._library import cuda_symbols

    for op in ("knn_softmax", "knn_interpolate", "knn_target_log_prob"):
        assert {op, f"{op}.tensor"} <= set(cuda_symbols()), f"the CUDA library lacks {op}"


def neighbors(rows: int, k: int, vocab_size: int, device: str = "cuda") -> tuple[Tensor, Tensor]:
    """Distances with an offset that loses digits if it is not taken away first; some padding."""
    distances = (torch.rand(rows, k, device=device) * 40).sort(1).values + 300
    pool = torch.randint(0, vocab_size, (max(1, k // 4),), device=device)
    tokens = pool[(torch.rand(rows, k, device=device) ** 2 * len(pool)).long()]
    padding = torch.rand(rows, k, device=device) < 0.05
    return distances.masked_fill(padding, INF), tokens.masked_fill(padding, -1)


def wide(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The reference in float64, on the CPU, as float32 on the GPU."""
    moved = [
        (t.double() if t.is_floating_point() else t).cpu() if isinstance(t, Tensor) else t
        for t in tensors
    ]
    return function(*moved).float().cuda()


SHAPES = [
    # rows, k, vocab_size
    (1, 1, 1),
    (7, 3, 7),
    (5, 64, 33_344),
    (5, 65, 50_257),
    (600, 1024, 33_344),
    (300, 1025, 5003),
    (3, 2048, 128_256),
    (3, 2049, 262_144),
    (2, 16_384, 1001),
    (2, 16_384, 524_288),
    (70_000, 4, 11),
]


@pytest.mark.parametrize(("rows", "k", "vocab_size"), SHAPES)
def test_softmax(rows: int, k: int, vocab_size: int) -> None:
    distances, tokens = neighbors(rows, k, vocab_size)
    got = knnext.knn_softmax(distances, tokens, 2.5, vocab_size)
    want = wide(lambda d, t: reference.knn_softmax(d, t, 2.5, vocab_size), distances, tokens)
    torch.testing.assert_close(got, want, **CLOSE)
    assert torch.equal(knnext.knn_softmax(distances, tokens.int(), 2.5, vocab_size), got)


@pytest.mark.parametrize("dtype", LOGITS)
@pytest.mark.parametrize(("rows", "k", "vocab_size"), SHAPES)
def test_interpolate(rows: int, k: int, vocab_size: int, dtype: torch.dtype) -> None:
    distances, tokens = neighbors(rows, k, vocab_size)
    logits = (torch.randn(rows, vocab_size, device="cuda") * 4).to(dtype)
    got = knnext.knn_interpolate(logits, distances, tokens, 2.5, 0.3)
    want = wide(
        lambda x, d, t: reference.knn_interpolate(x, d, t, 2.5, 0.3), logits, distances, tokens
    )
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("k", [1, 64, 65, 1024, 2049, 16_384])
def test_target(k: int) -> None:
    distances, tokens = neighbors(300, k, 50)
    targets = torch.randint(-1, 52, (300,), device="cuda")
    got = knnext.knn_target_log_prob(distances, tokens, targets, 3.0)
    want = wide(
        lambda d, t, y: reference.knn_target_log_prob(d, t, y, 3.0), distances, tokens, targets
    )
    torch.testing.assert_close(got, want, **CLOSE)
    narrow = knnext.knn_target_log_prob(distances, tokens.int(), targets.int(), 3.0)
    assert torch.equal(narrow, got)


def calls(rows: int = 300, k: int = 1024, vocab_size: int = 5003) -> list[Callable[[], Tensor]]:
    distances, tokens = neighbors(rows, k, vocab_size)
    logits = torch.randn(rows, vocab_size, device="cuda").half()
    temperature = torch.rand(rows, device="cuda") + 0.5
    lmbda = torch.tensor(0.3, device="cuda")
    targets = tokens[:, 0].contiguous()
    return [
        lambda: knnext.knn_softmax(distances, tokens, 2.0, vocab_size),
        lambda: knnext.knn_softmax(distances, tokens, temperature, vocab_size),
        lambda: knnext.knn_interpolate(logits, distances, tokens, 2.0, 0.3),
        lambda: knnext.knn_interpolate(logits, distances, tokens, temperature, lmbda),
        lambda: knnext.knn_target_log_prob(distances, tokens, targets, 2.0),
        lambda: knnext.knn_target_log_prob(distances, tokens, targets, temperature),
    ]


@pytest.mark.parametrize("which", range(6))
def test_same_bits_a_hundred_times(which: int) -> None:
    assert_same_bits_a_hundred_times(calls()[which])


@pytest.mark.parametrize("which", range(6))
def test_graph_capture_and_replay(which: int) -> None:
    assert_replays(calls()[which])


@pytest.mark.parametrize("which", range(6))
def test_side_stream(which: int) -> None:
    assert_kept_to_a_side_stream(calls()[which])


@pytest.mark.multi_gpu
def test_second_device() -> None:
    torch.cuda.set_device(0)
    distances, tokens = neighbors(5, 40, 30, device="cuda:1")
    got = knnext.knn_softmax(distances, tokens, 2.0, 30)
    assert got.device == distances.device and torch.cuda.current_device() == 0
    want = reference.knn_softmax(distances, tokens, 2.0, 30)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5])
def test_views_are_read_where_they_lie(offset: int) -> None:
    distances, tokens = neighbors(6, 40, 999)
    logits = torch.randn(6, 3, 999 + offset, device="cuda").half()[:, -1, offset:]
    got = knnext.knn_interpolate(logits, distances[:, 3:30], tokens[:, 3:30], 2.0, 0.3)
    want = knnext.knn_interpolate(
        logits.contiguous(), distances[:, 3:30].contiguous(), tokens[:, 3:30].contiguous(), 2.0, 0.3
    )
    torch.testing.assert_close(got, want, **CLOSE)
    turned = knnext.knn_softmax(distances.T.contiguous().T, tokens.T.contiguous().T, 2.0, 999)
    assert torch.equal(turned, knnext.knn_softmax(distances, tokens, 2.0, 999))


def test_rows_without_a_neighbor_and_rows_of_nan() -> None:
    distances, tokens = neighbors(4, 20, 30)
    tokens[1] = -1
    distances[2, 3], tokens[2, 3] = NAN, 7
    logits = torch.randn(4, 30, device="cuda")
    p_knn = knnext.knn_softmax(distances, tokens, 2.0, 30)
    assert (p_knn[1] == 0).all() and p_knn[2].isnan().all() and not p_knn[[0, 3]].isnan().any()
    mixed = knnext.knn_interpolate(logits, distances, tokens, 2.0, 1.0)
    torch.testing.assert_close(mixed[1], logits[1].log_softmax(0), **CLOSE)
    assert mixed[2].isnan().all() and not mixed[[0, 3]].isnan().any()


def test_k_past_the_limit_is_refused() -> None:
    distances, tokens = neighbors(1, 16_385, 30)
    with pytest.raises(RuntimeError, match="k must be at most 16384 on CUDA, got 16385"):
        knnext.knn_softmax(distances, tokens, 2.0, 30)


def _leaves() -> tuple[Tensor, ...]:
    distances, tokens = neighbors(3, 12, 9)
    distances = distances.masked_fill(tokens < 0, 400.0).requires_grad_()
    logits = torch.randn(3, 9, device="cuda", requires_grad=True)
    temperature = torch.tensor([1.0, 2.0, 4.0], device="cuda", requires_grad=True)
    lmbda = torch.tensor(0.3, device="cuda", requires_grad=True)
    return logits, distances, tokens, temperature, lmbda


def test_gradients_are_those_of_the_cpu() -> None:
    logits, distances, tokens, temperature, lmbda = _leaves()
    leaves = [logits, distances, temperature, lmbda]
    weight = torch.randn(3, 9)

    def gradients(device: str) -> list[Tensor]:
        moved = [x.detach().to(device).requires_grad_() for x in leaves]
        x, d, t, w = moved
        out = knnext.knn_interpolate(x, d, tokens.to(device), t, w)
        out = out + knnext.knn_softmax(d, tokens.to(device), t, 9)
        target = knnext.knn_target_log_prob(d, tokens.to(device), tokens[:, 0].to(device), t)
        loss = (out * weight.to(device)).sum() + target.clamp_min(-50).sum()
        return [g.cpu() for g in torch.autograd.grad(loss, moved)]

    for got, want in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gradcheck_in_float32() -> None:
    logits, distances, tokens, temperature, lmbda = _leaves()

    def mixed(x: Tensor, d: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return knnext.knn_interpolate(x, d, tokens, t, w)

    # The CUDA ops work in float32: a wide step, and what rounding leaves of the difference.
    assert torch.autograd.gradcheck(
        mixed, (logits, distances, temperature, lmbda), eps=2e-2, atol=2e-2, rtol=2e-2,
        nondet_tol=0.0,
    )  # fmt: skip


def test_opcheck() -> None:
    logits, distances, tokens, temperature, lmbda = _leaves()
    ops = torch.ops.knnext
    targets = tokens[:, 0].contiguous()
    torch.library.opcheck(ops.knn_softmax.default, (distances, tokens, 2.0, 9))
    torch.library.opcheck(ops.knn_softmax.tensor, (distances, tokens, temperature, 9))
    mix = (logits, distances, tokens)
    torch.library.opcheck(ops.knn_interpolate.default, (*mix, 2.0, 0.3))
    torch.library.opcheck(ops.knn_interpolate.tensor, (*mix, temperature, lmbda))
    torch.library.opcheck(ops.knn_target_log_prob.default, (distances, tokens, targets, 2.0))


def test_compile() -> None:
    logits, distances, tokens, temperature, lmbda = _leaves()
    run = torch.compile(knnext.knn_interpolate, fullgraph=True)
    got = run(logits, distances, tokens, temperature, lmbda)
    want = knnext.knn_interpolate(logits, distances, tokens, temperature, lmbda)
    torch.testing.assert_close(got, want)
