"""logit-sum: the formula written out, the LM as its start, and the tiny run."""

from __future__ import annotations

import pytest
import torch

from knnext.experiments.lab.examples import layer_examples
from knnext.experiments.lab.figures import new_figure
from knnext.experiments.lab.training import log_p
from knnext.experiments.logit_sum import LogitSum, plot
from knnext.experiments.run import run_experiment


def test_it_is_the_formula_and_trains_the_second_matrix_alone():
    generator = torch.Generator().manual_seed(0)
    output, bias = torch.randn(6, 3, generator=generator), torch.randn(6, generator=generator)
    module = LogitSum(output, bias, 4)
    module.second.data = torch.randn(6, 4, generator=generator)
    ffn, att = torch.randn(5, 3, generator=generator), torch.randn(5, 4, generator=generator)
    targets = torch.arange(5)
    logits = ffn @ output.T + bias + att @ module.second.T
    expected = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    found = module((ffn, att), targets)
    torch.testing.assert_close(found, expected)
    assert [n for n, _ in module.named_parameters()] == ["second"]
    ours, theirs = (torch.autograd.grad(x.sum(), module.second)[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_it_starts_as_the_lm(tiny_lab):
    lm, split = tiny_lab.lm(), tiny_lab.split("valid")
    module = LogitSum(lm.output_embedding, lm.output_bias, 32)
    found = log_p(module, layer_examples(tiny_lab, "ffn", "att")("valid"))
    torch.testing.assert_close(found, split.log_p_lm, atol=1e-4, rtol=1e-4)


def test_it_runs_and_what_it_says_is_consistent(tiny_lab):
    result = run_experiment(
        "logit-sum", tiny_lab.preset, tiny_lab.folder, lab=tiny_lab, say=lambda _line: None
    )
    rows = {row["system"]: row for row in result["rows"]}
    alone, mixed = rows["logit sum alone"], rows["logit sum, mixed with the LM"]
    assert alone["lmbda"] == 1 and alone["mixture"] == pytest.approx(alone["alone"])
    assert alone["alone"] == pytest.approx(mixed["alone"])
    # It starts as the LM and the best weights on valid are kept: training only helps there.
    for history in result["details"]["training"]["logit sum"]["history"]:
        best = min(check["valid"] for check in history)
        assert best < -float(tiny_lab.split("valid").log_p_lm.mean())
    figure, axes = new_figure()
    plot(result, axes)
    assert len(axes.patches) == 4 and figure is axes.figure
