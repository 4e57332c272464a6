"""Every vector path of the mixing ops that this processor has, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import knnext._host
from knnext import reference
from knnext.testing import assert_close
from tests.ops.mixing_cases import INF, neighbors, run_python

PATHS = knnext._host.build_info()["vector_paths"]
SIZES = [(3, 1, 1), (4, 15, 17), (4, 16, 31), (4, 33, 1024), (4, 65, 1025), (3, 700, 5001)]

CODE = """
import sys, torch, knnext
folder = sys.argv[1]
results = []
for x, d, tokens, targets, t in torch.load(folder + "/cases.pt"):
    results.append((
        knnext.knn_softmax(d, tokens, t, x.shape[1]),
        knnext.knn_interpolate(x, d, tokens, t, 0.3),
        knnext.knn_interpolate(x, d, tokens, t, 1.0),
        knnext.knn_target_log_prob(d, tokens, targets, t),
    ))
torch.save(results, folder + "/results.pt")
"""


def cases() -> list[tuple]:
    out = []
    for rows, k, vocab_size in SIZES:
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            d, tokens = neighbors(rows, k, vocab_size, spread=200.0)
            x = (5 * torch.randn(rows, vocab_size)).to(dtype)
            x[0, -1] = -INF
            tokens = tokens if dtype == torch.float32 else tokens.int()
            out.append((x, d, tokens, tokens[:, 0].contiguous(), 1.5))
    return out


def accuracy_of_exp_and_log() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of two neighbors, 0 and x away: p = (1, e^-x) / (1 + e^-x)."""
    x = torch.cat([torch.linspace(0, 87, 20001), torch.logspace(-8, 0, 5000)])
    distances = torch.stack([torch.zeros_like(x), x], 1)
    return distances, torch.tensor([[0, 1]]).expand(len(x), 2), x.double()


@pytest.mark.parametrize(
    "path", [PATHS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in PATHS[1:])]
)
def test_path(path: str, tmp_path: Path) -> None:
    if path not in knnext._host.usable_cpu_isas():
        pytest.skip(f"this processor has no {path}")
    distances, tokens, x = accuracy_of_exp_and_log()
    zero = torch.zeros(len(x), dtype=torch.int64)
    given = [*cases(), (torch.zeros(len(x), 2), distances, tokens, zero, 1.0)]
    torch.save(given, tmp_path / "cases.pt")
    code = f"import sys; sys.argv = ['', {str(tmp_path)!r}]\n" + CODE
    run_python(code, KNNEXT_CPU_ISA=path)
    *results, (p, _, log_p, _) = torch.load(tmp_path / "results.pt")

    for (x_lm, d, tok, targets, t), got in zip(given, results, strict=False):
        wide, vocab_size = d.double(), x_lm.shape[1]
        lm = x_lm.double()
        assert_close(got[0], reference.knn_softmax(wide, tok, t, vocab_size), "probability")
        for lmbda, log_mix in ((0.3, got[1]), (1.0, got[2])):
            want = reference.knn_interpolate(lm, wide, tok, t, lmbda)
            assert_close(log_mix, want, "log_probability")
        want = reference.knn_target_log_prob(wide, tok, targets, t)
        assert_close(got[3], want, "log_probability")

    # A few ulp (6e-8 each): exp, the sum and the division; then log near 1 and far from it.
    ratio = (p[:, 1].double() / p[:, 0].double()) / (-x).exp()
    assert (ratio - 1).abs().max() < 4e-7
    want = torch.stack([torch.zeros_like(x), -x], 1) - torch.log1p((-x).exp())[:, None]
    error = (log_p.double() - want).abs() / want.abs().clamp_min(1)
    assert error.max() < 2e-7
