"""The gradients on a GPU: held to float64, of fixed bits, captured, and on a second device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import knnext
from knnext import reference
from knnext.ops import _gradients
from knnext.ops._schemas import GRADIENT_NAMES
from knnext.testing import assert_close
from tests.gpu.runs import (
    assert_kept_to_a_side_stream,
    assert_replays,
    assert_same_bits_a_hundred_times,
    same,
)

pytestmark = pytest.mark.gpu
INF = float("inf")
OPS = torch.ops.knnext


@pytest.fixture(autouse=True)
def _needs_the_kernels() -> None:
    from knnext.ops._library import REPORT

    assert not REPORT.cuda, REPORT.cuda
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(has(f"knnext::{name}", "CUDA") for name in GRADIENT_NAMES)


def neighbors(rows: int, k: int, vocab_size: int, device: str = "cuda") -> tuple[Tensor, Tensor]:
    distances = (torch.rand(rows, k, device=device) * 40).sort(1).values + 300
    pool = torch.randint(0, vocab_size, (max(1, k // 4),), device=device)
    tokens = pool[(torch.rand(rows, k, device=device) ** 2 * len(pool)).long()]
    padding = torch.rand(rows, k, device=device) < 0.05
    return distances.masked_fill(padding, INF), tokens.masked_fill(padding, -1)


def wide(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return (value.double() if value.is_floating_point() else value).cpu()


def check(name: str, args: tuple, got: tuple[Tensor, ...]) -> None:
    """Against plain PyTorch in float64, by the largest value of each row.

    Those of parameters are sums over a row, in which large terms may cancel.
    """
    want = _gradients.GRADIENTS[name](*map(wide, args))
    terms = args[0].abs().reshape(args[0].shape[0], -1).sum(1).max().item() / 1000
    for g, w in zip(got, want, strict=True):
        scale = w.abs()
        scale = scale.amax(1, keepdim=True) if w.dim() == 2 else scale.amax().clamp_min(terms)
        if g.dtype in (torch.float32, torch.float64):
            assert_close(g, w, "gradient", 3 * scale.clamp_min(0.1))
        else:
            torch.testing.assert_close(
                g.cpu(), w.to(g.dtype), rtol=1e-2, atol=float(scale.max()) / 100
            )


def interpolate_args(
    rows: int, k: int, vocab_size: int, dtype: torch.dtype, lmbda: float = 0.3, device: str = "cuda"
) -> tuple:
    distances, tokens = neighbors(rows, k, vocab_size, device)
    logits = (torch.randn(rows, vocab_size, device=device) * 4).to(dtype)
    grad = torch.randn(rows, vocab_size, device=device)
    mixed = knnext.knn_interpolate(logits, distances, tokens, 2.5, lmbda)
    return grad, logits, distances, tokens, mixed, 2.5, lmbda, True, True


def rescore_args(
    rows: int, m: int, dim: int, dtype: torch.dtype, metric: str, device: str = "cuda"
) -> tuple:
    queries = torch.randn(rows, dim, device=device).to(dtype)
    keys = torch.randn(500, dim, device=device).to(dtype)
    indices = torch.randint(-1, 400, (rows, m), device=device)
    order = indices.reshape(-1).sort(stable=True).indices
    grad = torch.randn(rows, m, device=device)
    return grad, queries, keys, indices, order, metric, True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "k", "vocab_size"),
    [(1, 1, 1), (7, 3, 7), (5, 65, 50_257), (300, 1024, 5003), (3, 2048, 128_256),
     (2, 2049, 262_144), (2, 16_384, 1001), (70_000, 4, 11), (1, 8, 2_000_003)],
)  # fmt: skip
def test_interpolate(rows: int, k: int, vocab_size: int, dtype: torch.dtype) -> None:
    args = interpolate_args(rows, k, vocab_size, dtype)
    got = OPS._knn_interpolate_gradients(*args)
    check("_knn_interpolate_gradients", args, got)
    for needs in ((True, False), (False, True), (False, False)):
        part = OPS._knn_interpolate_gradients(*args[:-2], *needs)
        assert all(torch.equal(p, g) for p, g in zip(part[1:3], got[1:3], strict=True))
        assert part[0].shape[0] == (rows if needs[0] else 0)


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (300, 65), (40, 1024), (3, 16_384), (70_000, 4)])
def test_softmax_and_target(rows: int, k: int) -> None:
    distances, tokens = neighbors(rows, k, 97)
    args = (torch.randn(rows, 97, device="cuda"), distances, tokens.int(), 2.0)
    check("_knn_softmax_gradients", args, OPS._knn_softmax_gradients(*args))
    targets = torch.randint(-1, 99, (rows,), device="cuda")
    log_p = knnext.knn_target_log_prob(distances, tokens, targets, 2.0)
    args = (torch.randn(rows, device="cuda"), distances, tokens, targets, log_p, 2.0)
    got = OPS._knn_target_log_prob_gradients(*args)
    check("_knn_target_log_prob_gradients", args, got)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [1, 7, 128, 129, 1024])
def test_rescore(dim: int, dtype: torch.dtype, metric: str) -> None:
    args = rescore_args(33, 70, dim, dtype, metric)
    got = OPS._rescore_gradients(*args)
    check("_rescore_gradients", args, got)
    assert (got[1][400:] == 0).all()
    alone = OPS._rescore_gradients(*args[:4], None, metric, True)
    assert torch.equal(alone[0], got[0]) and alone[1].shape == (0, dim)


def calls() -> list[Callable[[], tuple[Tensor, ...]]]:
    mix = interpolate_args(300, 1024, 5003, torch.float16)
    few = interpolate_args(2, 1024, 50_257, torch.float16)
    softmax = (mix[0], *mix[2:4], 2.0)
    targets = mix[3][:, 0].contiguous()
    log_p = knnext.knn_target_log_prob(*mix[2:4], targets, 2.0)
    target = (mix[0][:, 0].contiguous(), *mix[2:4], targets, log_p, 2.0)
    rescore = rescore_args(300, 200, 768, torch.float16, "l2")
    return [
        lambda: OPS._knn_interpolate_gradients(*mix),
        lambda: OPS._knn_interpolate_gradients(*few),
        lambda: OPS._knn_softmax_gradients(*softmax),
        lambda: OPS._knn_target_log_prob_gradients(*target),
        lambda: OPS._rescore_gradients(*rescore),
        # Forward, a few long rows: split over the device.
        lambda: (knnext.knn_interpolate(*few[1:4], 2.0, 0.3),),
        lambda: (knnext.knn_softmax(*few[2:4], 2.0, 50_257),),
    ]


@pytest.mark.parametrize("which", range(7))
def test_same_bits_a_hundred_times(which: int) -> None:
    assert_same_bits_a_hundred_times(calls()[which])


@pytest.mark.parametrize("which", range(7))
def test_graph_capture_and_replay(which: int) -> None:
    assert_replays(calls()[which])


@pytest.mark.parametrize("which", range(7))
def test_side_stream(which: int) -> None:
    assert_kept_to_a_side_stream(calls()[which])


@pytest.mark.parametrize("rows", [1, 8, 64, 65])
@pytest.mark.parametrize("vocab_size", [33_344, 50_257, 128_256, 262_144])
def test_few_long_rows(rows: int, vocab_size: int) -> None:
    _, logits, distances, tokens, mixed, t, lmbda, *_ = interpolate_args(
        rows, 1024, vocab_size, torch.bfloat16
    )
    wide_args = (logits.double().cpu(), distances.double().cpu(), tokens.cpu(), t, lmbda)
    want = reference.knn_interpolate(*wide_args)
    torch.testing.assert_close(mixed.cpu(), want.float(), rtol=5e-6, atol=5e-6)
    p_knn = knnext.knn_softmax(distances, tokens, t, vocab_size)
    want = reference.knn_softmax(wide_args[1], wide_args[2], t, vocab_size)
    torch.testing.assert_close(p_knn.cpu(), want.float(), rtol=5e-6, atol=5e-6)


def test_the_gradient_of_keys_that_many_queries_name_has_fixed_bits() -> None:
    queries = torch.randn(2000, 64, device="cuda", requires_grad=True)
    keys = torch.randn(5, 64, device="cuda", requires_grad=True)
    indices = torch.randint(0, 5, (2000, 50), device="cuda")

    def grads() -> tuple[Tensor, ...]:
        out = knnext.rescore(queries, keys, indices)
        return torch.autograd.grad(out.square().sum(), (queries, keys))

    first = grads()
    assert all(same(grads(), first) for _ in range(20))


@pytest.mark.multi_gpu
def test_every_op_runs_on_the_device_of_its_tensors() -> None:
    """While another device is the current one, on a side stream of the tensors' device."""
    torch.cuda.set_device(0)
    x = torch.randn(40, 64, device="cuda:1").half()
    args = interpolate_args(3, 1024, 50_257, torch.float16, device="cuda:1")
    _, logits, distances, tokens, mixed, t, lmbda, *_ = args
    targets, indices = tokens[:, 0].contiguous(), tokens % 40
    rescore = rescore_args(9, 20, 64, torch.float16, "l2", device="cuda:1")
    log_p = knnext.knn_target_log_prob(distances, tokens, targets, t)
    runs: dict[str, Callable[[], object]] = {
        "knn_search": lambda: knnext.knn_search(x[:3], x, 5),
        "key_sqnorms": lambda: knnext.key_sqnorms(x),
        "rescore": lambda: knnext.rescore(x[:3], x, indices),
        "merge_topk": lambda: knnext.merge_topk(distances, tokens, 7),
        "knn_softmax": lambda: knnext.knn_softmax(distances, tokens, t, 50_257),
        "knn_interpolate": lambda: knnext.knn_interpolate(logits, distances, tokens, t, lmbda),
        "knn_target_log_prob": lambda: knnext.knn_target_log_prob(distances, tokens, targets, t),
        "gradients of knn_softmax": lambda: OPS._knn_softmax_gradients(
            args[0], distances, tokens, t
        ),
        "gradients of knn_interpolate": lambda: OPS._knn_interpolate_gradients(*args),
        "gradients of knn_target_log_prob": lambda: OPS._knn_target_log_prob_gradients(
            mixed[:, 0].contiguous(), distances, tokens, targets, log_p, t
        ),
        "gradients of rescore": lambda: OPS._rescore_gradients(*rescore),
    }
    for name, run in runs.items():
        with torch.cuda.device(1):
            want = run()
        torch.cuda.synchronize(1)
        stream = torch.cuda.Stream(device=1)
        with torch.cuda.stream(stream):  # which also makes device 1 the current one
            torch.cuda._sleep(10_000_000)
            torch.cuda.set_device(0)
            got = run()
        stream.synchronize()
        assert torch.cuda.current_device() == 0, name
        for g, w in zip(_tensors(got), _tensors(want), strict=True):
            assert g.device == w.device == x.device and torch.equal(g, w), name


def _tensors(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]
