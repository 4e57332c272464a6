"""The compiled gradients against plain PyTorch in float64: vector paths, rounding, threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import knnext
import knnext._host
from knnext import reference
from knnext.ops import _gradients
from knnext.testing import assert_close
from tests.ops.mixing_cases import INF, NAN, neighbors, run_python, threads

PATHS = knnext._host.build_info()["vector_paths"]
SIZES = [(3, 1, 1), (4, 15, 17), (4, 16, 31), (4, 33, 1025), (3, 700, 5001)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPS = torch.ops.knnext

CODE = """
import sys, torch, knnext
folder = sys.argv[1]
ops = torch.ops.knnext
results = []
for name, args in torch.load(folder + "/cases.pt"):
    results.append(getattr(ops, name).default(*args))
torch.save(results, folder + "/results.pt")
"""


def interpolate_args(rows: int, k: int, vocab_size: int, dtype: torch.dtype, lmbda: float) -> tuple:
    d, tokens = neighbors(rows, k, vocab_size, spread=20.0, base=300.0)
    x, grad = (5 * torch.randn(rows, vocab_size)).to(dtype), torch.randn(rows, vocab_size)
    if vocab_size > 20:
        x[0, -1] = -INF
    mixed = reference.knn_interpolate(x.double(), d.double(), tokens, 1.5, lmbda).float()
    return grad, x, d, tokens, mixed, 1.5, lmbda, True, True


def cases() -> list[tuple[str, tuple]]:
    out: list[tuple[str, tuple]] = []
    for rows, k, vocab_size in SIZES:
        for dtype in DTYPES:
            args = interpolate_args(rows, k, vocab_size, dtype, 0.3)
            out.append(("_knn_interpolate_gradients", args))
        grad, _, d, tokens, *_ = args
        out.append(("_knn_softmax_gradients", (grad, d, tokens.int(), 1.5)))
        targets = tokens[:, 0].contiguous()
        log_p = reference.knn_target_log_prob(d.double(), tokens, targets, 1.5).float()
        given = (grad[:, 0].contiguous(), d, tokens, targets, log_p, 1.5)
        out.append(("_knn_target_log_prob_gradients", given))
    for dim in (1, 7, 65, 700):
        for dtype in DTYPES[:3]:
            queries, keys = torch.randn(5, dim).to(dtype), torch.randn(40, dim).to(dtype)
            indices = torch.randint(-1, 30, (5, 33))
            order = indices.reshape(-1).sort(stable=True).indices
            for metric in ("l2", "ip"):
                given = (torch.randn(5, 33), queries, keys, indices, order, metric, True)
                out.append(("_rescore_gradients", given))
    return out


def wide(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(name: str, args: tuple, got: tuple[Tensor, ...]) -> None:
    want = _gradients.GRADIENTS[name](*map(wide, args))
    for g, w in zip(got, want, strict=True):
        scale = w.abs()
        scale = scale.amax(1, keepdim=True) if w.dim() == 2 else scale.amax().clamp_min(1.0)
        if g.dtype in (torch.float32, torch.float64):
            # A gradient of the log of a small p has the rounding of that log.
            assert_close(g, w, "gradient", 3 * scale.clamp_min(0.1))
        else:
            torch.testing.assert_close(g, w.to(g.dtype), rtol=1e-2, atol=float(scale.max()) / 100)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_path(path: str, tmp_path: Path) -> None:
    if path not in knnext._host.usable_cpu_isas():
        pytest.skip(f"this processor has no {path}")
    given = [*cases(), *rounding_cases()]
    torch.save(given, tmp_path / "cases.pt")
    run_python(f"import sys; sys.argv = ['', {str(tmp_path)!r}]\n" + CODE, KNNEXT_CPU_ISA=path)
    results = torch.load(tmp_path / "results.pt")
    *plain, half, bfloat16 = zip(given, results, strict=True)
    for (name, args), got in plain:
        check(name, args, got)
    for (_, args), got in (half, bfloat16):
        assert torch.equal(got[0][:, 1:], args[0][:, 1:].to(got[0].dtype))


def rounding_cases() -> list[tuple[str, tuple]]:
    """Rows whose LM is sure of token 0: elsewhere the logits' gradient is the one given."""
    exponents = torch.arange(-27, 16).float()
    values = (1 + torch.arange(0, 2048 * 4 + 1) / (2048 * 4)) * torch.exp2(exponents)[:, None]
    grad = torch.cat([values, -values], 1).clamp(-65500, 65500)
    mixed = torch.full_like(grad, -INF)
    mixed[:, 0] = 0.0
    d, tokens = torch.full((grad.shape[0], 1), INF), torch.full((grad.shape[0], 1), -1)
    return [
        ("_knn_interpolate_gradients", (grad, mixed.to(t), d, tokens, mixed, 1.0, 0.5, True, False))
        for t in (torch.float16, torch.bfloat16)
    ]


@pytest.mark.parametrize("lmbda", [0.0, 1e-4, 0.25, 0.999, 1.0])
def test_the_gradient_of_one_target(lmbda: float) -> None:
    _, x, d, tokens, _, t, *_ = interpolate_args(5, 100, 40, torch.float32, lmbda)
    grad = torch.zeros(5, 40)
    grad[torch.arange(5), tokens[:, 0].clamp_min(0)] = -1.0
    mixed = reference.knn_interpolate(x.double(), d.double(), tokens, t, lmbda)
    args = (x.double(), d.double(), tokens, mixed, t, lmbda, True, True)
    want = _gradients.knn_interpolate(grad.double(), *args)
    got = OPS._knn_interpolate_gradients(grad, x, d, tokens, mixed.float(), t, lmbda, True, True)
    for g, w in zip(got, want, strict=True):
        finite = w.isfinite()
        assert torch.equal(g.isfinite(), finite)
        scale = w.masked_fill(~finite, 0.0).abs()
        scale = scale.amax(1, keepdim=True) if w.dim() == 2 else scale.clamp_min(1e-3)
        assert_close(
            g.masked_fill(~finite, 0.0), w.masked_fill(~finite, 0.0), "gradient", 3 * scale
        )


def test_rows_of_nan_give_nan_and_spoil_no_other() -> None:
    grad, x, d, tokens, mixed, *rest = interpolate_args(4, 20, 30, torch.float32, 0.3)
    d[2, 3], tokens[2, 3] = NAN, 5
    targets, log_p = tokens[:, 4].contiguous(), torch.tensor([-1.0, -INF, NAN, -1.0])
    for got in (
        OPS._knn_interpolate_gradients(grad, x, d, tokens, mixed, *rest),
        OPS._knn_softmax_gradients(grad, d, tokens, 1.0),
        OPS._knn_target_log_prob_gradients(grad[:, 0], d, tokens, targets, log_p, 1.0),
    ):
        assert all(g[2].isnan().all() and not g[[0, 1, 3]].isnan().any() for g in got)


@pytest.mark.parametrize("name", _gradients.GRADIENTS)
def test_same_bits_whatever_the_threads(name: str) -> None:
    for case, args in [c for c in cases() if c[0] == name][-4:]:
        want = getattr(OPS, case)(*args)
        for count in (1, 3, 7):
            with threads(count):
                got = getattr(OPS, case)(*args)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("name", _gradients.GRADIENTS)
def test_opcheck(name: str) -> None:
    args = next(args for case, args in cases()[8:] if case == name)
    torch.library.opcheck(getattr(OPS, name).default, args)
    if name == "_knn_interpolate_gradients":
        few = (*args[:-2], False, False)
        torch.library.opcheck(OPS._knn_interpolate_gradients.default, few)
        t, lmbda = torch.tensor(1.5), torch.full((args[0].shape[0],), 0.3)
        torch.library.opcheck(
            OPS._knn_interpolate_gradients.tensor, (*args[:5], t, lmbda, True, True)
        )


def test_a_bad_token_is_named_and_not_read() -> None:
    grad, x, d, tokens, mixed, *rest = interpolate_args(4, 20, 30, torch.float32, 0.3)
    tokens[3, 1] = 30
    with pytest.raises(RuntimeError, match=r"in \[-1, V\) with V = 30, got 30 in row 3"):
        OPS._knn_interpolate_gradients(grad, x, d, tokens, mixed, *rest)
    with pytest.raises(RuntimeError, match=r"in \[-1, V\) with V = 30, got 30 in row 3"):
        OPS._knn_softmax_gradients(grad, d, tokens, 1.0)
    indices = torch.tensor([[0, 9]])
    with pytest.raises(RuntimeError, match=r"indices must lie in \[-1, 9\), got 9"):
        OPS._rescore_gradients(
            torch.ones(1, 2), torch.ones(1, 3), torch.ones(9, 3), indices, None, "l2", True
        )


def test_the_backward_of_each_op_is_one_call_of_its_kernel() -> None:
    d, tokens = neighbors(3, 9, 7)
    x, keys = torch.randn(3, 7, requires_grad=True), torch.randn(20, 5, requires_grad=True)
    lmbda = torch.tensor(0.3, requires_grad=True)
    d = d.masked_fill(tokens < 0, 1.0).requires_grad_()
    losses = {
        "knn_softmax": lambda: knnext.knn_softmax(d, tokens, 2.0, 7),
        "knn_interpolate": lambda: knnext.knn_interpolate(x, d, tokens, 2.0, lmbda),
        "knn_target_log_prob": lambda: knnext.knn_target_log_prob(d, tokens, tokens[:, 0], 2.0),
        "rescore": lambda: knnext.rescore(keys[:3], keys, tokens.clamp_min(0)),
    }
    for name, run in losses.items():
        loss = run().clamp_min(-50).sum()
        with torch.profiler.profile() as profile:
            loss.backward()
        calls = [e.name for e in profile.events() if e.name.startswith("knnext::")]
        assert calls == [f"knnext::_{name}_gradients"]
