"""``knnext doctor --check``: every op on the devices at hand against the reference, in seconds.

It is what to run first on a card or a processor that nobody has tried: each dtype and metric, the
same bits twice, gradients; on CUDA the search's slow path, forced, and a captured graph.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import knnext
from knnext import reference
from knnext.ops import REPORT, _gradients, _tangents
from knnext.say import Say
from knnext.testing import (
    TOLERANCES,
    assert_close,
    assert_equal_results,
    assert_order,
    assert_search,
    assert_topk_close,
)

Check = Callable[[torch.device], None]
INF = float("inf")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
METRICS = ("l2", "ip")
VOCAB = 500
# Queries, keys, width, k: few and many queries, lists short and long, sizes that fill no tile.
SEARCHES = ((1, 700, 20, 10), (5, 300, 7, 320), (30, 1500, 65, 64))
CUDA_SEARCHES = (*SEARCHES, (20, 9001, 64, 130), (150, 9001, 64, 130))
# Every query leaves the fast path; read by csrc/cuda/search at each call.
FORCED = "stride=16,rank=60,fail=1"


def run_checks(devices: list[torch.device], say: Say) -> list[dict[str, Any]]:
    """Says a line for each check; returns name, device, verdict, seconds and what went wrong."""
    results = []
    for device in devices:
        for name, check in checks(device):
            start, wrong = time.perf_counter(), ""
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    check(device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except Exception as error:  # whatever it is, the next check may tell more
                wrong = " ".join(f"{type(error).__name__}: {error}".split())
            took = time.perf_counter() - start
            verdict = "FAILED" if wrong else "ok"
            line = f"{verdict:6} {device!s:7} {name:34} {took:6.2f} s"
            say(f"{line}  {wrong[:300]}" if wrong else line)
            results.append(
                {"name": name, "device": str(device), "ok": not wrong}
                | {"seconds": round(took, 3), "error": wrong}
            )
    return results


def checks(device: torch.device) -> Iterator[tuple[str, Check]]:
    """What there is to check on such a device, by name."""
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for metric in METRICS:
            yield f"knn_search {name} {metric}", _with(_search, dtype, metric)
            yield f"rescore {name} {metric}", _with(_rescore, dtype, metric)
            yield f"rescore gradients {name} {metric}", _with(_rescore_gradients, dtype, metric)
            yield f"knn_search_codes {name} {metric}", _with(_search_codes, dtype, metric)
        yield f"encode_keys {name}", _with(_encode_keys, dtype)
        yield f"key_sqnorms {name}", _with(_key_sqnorms, dtype)
        yield f"knn_interpolate {name}", _with(_interpolate, dtype)
    yield "merge_topk", _merge
    yield "gather_tokens", _gather
    yield "knn_softmax", _softmax
    yield "knn_target_log_prob", _target
    yield "mixing gradients", _mixing_gradients
    yield "forward derivatives", _forward_derivatives
    yield "the same bits twice", _same_bits
    if device.type == "cuda":
        if not REPORT.cuda:
            yield "knn_search, its slow path forced", _forced
        yield "a captured graph", _graph


def _with(check: Callable[..., None], *options: Any) -> Check:
    return lambda device: check(device, *options)


def _rows(device: torch.device, count: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, dim, device="cpu", dtype=torch.float32).to(device, dtype)


def _search(device: torch.device, dtype: torch.dtype, metric: str) -> None:
    half_on_cuda = device.type == "cuda" and dtype != torch.float32
    kind = "tensor_core" if half_on_cuda else "expanded"
    shapes = CUDA_SEARCHES if device.type == "cuda" else SEARCHES
    for num_queries, num_keys, dim, k in shapes:
        queries, keys = (_rows(device, n, dim, dtype) for n in (num_queries, num_keys))
        keys[num_keys // 2] = keys[3]  # a duplicate: the lower index comes first
        got = knnext.knn_search(queries, keys, k, metric)
        assert_search(got, queries, keys, k, metric, kind=kind)
        norms, half = knnext.key_sqnorms(keys), num_keys // 2
        first = knnext.knn_search(queries, keys[:half], k, metric, key_sqnorms=norms[:half])
        rest: dict[str, Any] = {"init_distances": first[0], "init_indices": first[1]}
        both = knnext.knn_search(queries, keys[half:], k, metric, index_offset=half, **rest)
        slack = 4 * TOLERANCES[kind].relative * float(norms.max() + queries.float().norm() ** 2)
        assert_topk_close(both, got, slack)
        refined = knnext.knn_search(keys[:2], keys, min(k, 9), metric, refine=True)
        assert_order(*(x.cpu() for x in refined))
        if metric == "l2":
            assert (refined[0][:, 0] == 0).all(), "a row is not at distance 0 of itself"
    few = torch.randint(-3, 4, (2000, 16), device="cpu").to(device, dtype)  # many ties, all exact
    want = reference.knn_search(few[:30].cpu(), few.cpu(), 50, metric)
    assert_equal_results(knnext.knn_search(few[:30], few, 50, metric), want)


def _encode_keys(device: torch.device, dtype: torch.dtype) -> None:
    for dim in (1, 7, 64, 300):
        keys = _rows(device, 60, dim, dtype)
        keys[3] = 0
        codes = knnext.encode_keys(keys)
        scale, error, norm = codes.stats.double().cpu().unbind(1)
        restored = scale[:, None] * codes.codes.double().cpu()
        exact = reference.rotate(keys.double().cpu() - codes.center.double().cpu())
        assert ((exact - restored).norm(dim=1) <= error).all(), "a bound is too small"
        assert (error <= 0.03 * exact.norm(dim=1) + 1e-30).all(), "a bound is far too large"
        torch.testing.assert_close(norm, restored.norm(dim=1), rtol=1e-6, atol=0.0)


def _search_codes(device: torch.device, dtype: torch.dtype, metric: str) -> None:
    for num_queries, num_keys, dim, k in ((1, 900, 20, 10), (30, 4000, 65, 64)):
        queries, keys = (_rows(device, n, dim, dtype) + 3 for n in (num_queries, num_keys))
        keys[num_keys // 2] = keys[3]
        codes = knnext.encode_keys(keys)
        for refine in (False, True):
            want = knnext.knn_search(queries, keys, k, metric, refine=refine)
            got = knnext.knn_search(queries, keys, k, metric, refine=refine, codes=codes)
            assert_equal_results(got, want)


def _indices(device: torch.device, rows: int, m: int, num_keys: int) -> Tensor:
    return torch.randint(-1, num_keys, (rows, m), device="cpu").to(device)


def _rescore(device: torch.device, dtype: torch.dtype, metric: str) -> None:
    for dim in (1, 7, 64, 300):
        q, x = _rows(device, 9, dim, dtype), _rows(device, 50, dim, dtype)
        indices = _indices(device, 9, 33, 50)
        want = reference.rescore(q, x, indices, metric, torch.float64)
        scale = (
            want
            if metric == "l2"
            else -reference.rescore(q.abs(), x.abs(), indices, metric, torch.float64)
        )
        scale = scale.masked_fill(indices < 0, 0.0).abs()
        assert_close(knnext.rescore(q, x, indices, metric), want, "direct", scale)


def _rescore_gradients(device: torch.device, dtype: torch.dtype, metric: str) -> None:
    q, x = _rows(device, 9, 40, dtype), _rows(device, 50, 40, dtype)
    indices = _indices(device, 9, 33, 50)
    weight = _rows(device, 9, 33, torch.float32).masked_fill(indices < 0, 0.0)
    q_leaf, x_leaf = q.clone().requires_grad_(), x.clone().requires_grad_()
    scores = knnext.rescore(q_leaf, x_leaf, indices, metric).masked_fill(indices < 0, 0.0)
    got = torch.autograd.grad((scores * weight).sum(), (q_leaf, x_leaf))
    want = _gradients.rescore(
        weight.double(), q.double(), x.double(), indices, indices, metric, True
    )
    _compare_gradients(got, want, dtype)


def _compare_gradients(
    got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        largest = w.abs().max().item()
        half_ulp = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * largest
        error = (g.double() - w).abs().max().item()
        allowed = 3e-5 * max(largest, 0.1) + half_ulp
        assert error <= allowed, f"a gradient is off by {error:g}, allowed {allowed:g}"


def _key_sqnorms(device: torch.device, dtype: torch.dtype) -> None:
    for dim in (1, 65, 1600):
        x = 100 * _rows(device, 70, dim, dtype)  # beyond what half would hold
        want = reference.key_sqnorms(x, torch.float64)
        assert_close(knnext.key_sqnorms(x), want, "sqnorm")


def _merge(device: torch.device) -> None:
    for m, k in ((40, 7), (300, 300), (5, 20)):
        d = torch.randint(0, 20, (30, m), device="cpu").float().to(device)
        indices = _indices(device, 30, m, 10_000)
        assert_equal_results(knnext.merge_topk(d, indices, k), reference.merge_topk(d, indices, k))


def _gather(device: torch.device) -> None:
    values, indices = torch.arange(50, 150, device=device), _indices(device, 9, 40, 100)
    assert torch.equal(
        knnext.gather_tokens(values, indices), torch.where(indices < 0, -1, indices + 50)
    ), "tokens differ"


def _neighbors(device: torch.device, rows: int = 6, k: int = 90) -> tuple[Tensor, Tensor]:
    """Sorted distances with padding, and tokens that repeat; the second row has no neighbor."""
    d = 300 + 20 * torch.rand(rows, k, device="cpu", dtype=torch.float32).sort(1).values
    tokens = torch.randint(0, VOCAB, (rows, k), device="cpu")
    tokens[:, 1::4] = tokens[:, :1]
    tokens[:, ::9] = -1
    tokens[1] = -1
    return d.masked_fill(tokens < 0, INF).to(device), tokens.to(device)


def _parameters(device: torch.device) -> Iterator[tuple[Any, Any]]:
    """(temperature, lmbda): numbers, tensors (), tensors by row."""
    yield 1.5, 0.3
    for shape in ((), (6,)):
        t = torch.rand(shape, device="cpu", dtype=torch.float32)
        yield (t + 1).to(device), (0.9 * t).to(device)
    yield 2.5, 0.0
    yield 2.5, 1.0


def _softmax(device: torch.device) -> None:
    d, tokens = _neighbors(device)
    for t, _ in _parameters(device):
        want = reference.knn_softmax(d.double(), tokens, t, VOCAB)
        assert_close(knnext.knn_softmax(d, tokens, t, VOCAB), want, "probability")
        assert_close(knnext.knn_softmax(d, tokens.int(), t, VOCAB), want, "probability")


def _target(device: torch.device) -> None:
    d, tokens = _neighbors(device)
    for t, _ in _parameters(device):
        for targets in (tokens[:, 1], tokens[:, 2].clamp_min(0).int()):
            want = reference.knn_target_log_prob(d.double(), tokens, targets, t)
            got = knnext.knn_target_log_prob(d, tokens, targets, t)
            assert_close(got, want, "log_probability")


def _interpolate(device: torch.device, dtype: torch.dtype) -> None:
    d, tokens = _neighbors(device)
    x = 5 * _rows(device, 6, VOCAB, dtype)
    for t, weight in _parameters(device):
        want = reference.knn_interpolate(x.double(), d.double(), tokens, t, weight)
        assert_close(knnext.knn_interpolate(x, d, tokens, t, weight), want, "log_probability")


def _mixing_gradients(device: torch.device) -> None:
    d, tokens = _neighbors(device)
    d = d.masked_fill(tokens < 0, 400.0)
    x = 5 * _rows(device, 6, VOCAB, torch.float32)
    grad, targets = _rows(device, 6, VOCAB, torch.float32), tokens[:, 1].clamp_min(0)
    t, weight = (torch.full((6,), v, device=device, dtype=torch.float32) for v in (2.0, 0.4))

    def gradients(ops: Any, dtype: torch.dtype, numbers: bool) -> tuple[Tensor, ...]:
        leaves = [a.detach().to(dtype).requires_grad_() for a in (x, d, t, weight)]
        x_, d_, t_, w_ = leaves
        p, q = (2.0, 0.4) if numbers else (t_, w_)
        mixed = ops.knn_interpolate(x_, d_, tokens, p, q) + ops.knn_softmax(d_, tokens, p, VOCAB)
        log_p = ops.knn_target_log_prob(d_, tokens, targets, p).clamp_min(-50)
        loss = (mixed * grad.to(dtype)).sum() + log_p.sum()
        return torch.autograd.grad(loss, leaves[: 2 if numbers else 4])

    for numbers in (False, True):
        got = gradients(knnext, torch.float32, numbers)
        _compare_gradients(got, gradients(reference, torch.float64, numbers), torch.float32)


def _forward_derivatives(device: torch.device) -> None:
    d, tokens = _neighbors(device)
    x = _rows(device, 6, VOCAB, torch.float32)
    dx, dd = torch.randn_like(x), torch.randn_like(d)
    run = lambda x, d: knnext.knn_interpolate(x, d, tokens, 2.0, 0.4)  # noqa: E731
    out, tangent = torch.func.jvp(run, (x, d), (dx, dd))[:2]
    wide_x, wide_d, wide_out = x.double(), d.double(), out.double()
    want = _tangents.knn_interpolate(
        wide_x, wide_d, tokens, wide_out, 2.0, 0.4, dx.double(), dd.double(), None, None
    )
    _compare_gradients((tangent,), (want,), torch.float32)


def _calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """A call of each op, and one of all gradients."""
    queries, keys = (_rows(device, n, 64, torch.float16) for n in (40, 5000))
    codes = knnext.encode_keys(keys)
    d, tokens = _neighbors(device)
    x, indices = _rows(device, 6, VOCAB, torch.float32), _indices(device, 40, 30, 5000)

    def gradients() -> tuple[Tensor, ...]:
        leaves = [a.detach().requires_grad_() for a in (x, d, queries, keys)]
        loss = knnext.knn_interpolate(leaves[0], leaves[1], tokens, 2.0, 0.4).sum()
        scores = knnext.rescore(leaves[2], leaves[3], indices).masked_fill(indices < 0, 0.0)
        return torch.autograd.grad(loss + scores.sum(), leaves)

    return {
        "knn_search": lambda: knnext.knn_search(queries, keys, 100),
        "key_sqnorms": lambda: knnext.key_sqnorms(keys),
        "encode_keys": lambda: torch.ops.knnext.encode_keys(keys, codes.center),
        "knn_search_codes": lambda: knnext.knn_search(queries, keys, 100, codes=codes),
        "rescore": lambda: knnext.rescore(queries, keys, indices),
        "merge_topk": lambda: knnext.merge_topk(d, tokens, 20),
        "knn_softmax": lambda: knnext.knn_softmax(d, tokens, 2.0, VOCAB),
        "knn_interpolate": lambda: knnext.knn_interpolate(x, d, tokens, 2.0, 0.4),
        "knn_target_log_prob": lambda: knnext.knn_target_log_prob(d, tokens, tokens[:, 1], 2.0),
        "gradients": gradients,
    }


def _as_list(result: Any) -> list[Tensor]:
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [t.nan_to_num(nan=0.0) if t.is_floating_point() else t for t in tensors]


def _same_bits(device: torch.device) -> None:
    for name, run in _calls(device).items():
        first = _as_list(run())
        for _ in range(2):
            same = all(map(torch.equal, _as_list(run()), first))
            assert same, f"{name} gave other bits in a second call"


@contextmanager
def _forced_failures() -> Iterator[None]:
    before = os.environ.get("KNNEXT_TEST_SEARCH")
    os.environ["KNNEXT_TEST_SEARCH"] = FORCED
    try:
        yield
    finally:
        if before is None:
            del os.environ["KNNEXT_TEST_SEARCH"]
        else:
            os.environ["KNNEXT_TEST_SEARCH"] = before


def _forced(device: torch.device) -> None:
    for dtype in DTYPES:
        queries, keys = (
            torch.randint(-3, 4, (n, 40), device="cpu").to(device, dtype) for n in (40, 6000)
        )
        want = knnext.knn_search(queries, keys, 100)
        before = knnext.failed_queries(device)
        with _forced_failures():
            got = knnext.knn_search(queries, keys, 100)
        assert_equal_results(got, want)
        left = knnext.failed_queries(device) - before
        assert left == 40, f"{left} of 40 queries took the slow path"


def _graph(device: torch.device) -> None:
    queries, keys = (_rows(device, n, 64, torch.float16) for n in (40, 5000))
    x, values = _rows(device, 40, VOCAB, torch.float32), torch.arange(5000, device=device) % VOCAB

    def step() -> tuple[Tensor, ...]:
        d, indices = knnext.knn_search(queries, keys, 64)
        tokens = knnext.gather_tokens(values, indices)
        return d, indices, knnext.knn_interpolate(x, d, tokens, 2.0, 0.4)

    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(2):
            queries.copy_(torch.randn_like(queries))
            graph.replay()
            for got, want in zip(captured, step(), strict=True):
                assert torch.equal(got, want), "a replayed graph gives other results"
