"""mixture-of-softmaxes: the formula written out, the control, a planted case, the tiny run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from knnext.evaluation.bootstrap import Interval
from knnext.experiments import mixture_of_softmaxes
from knnext.experiments.lab.examples import Examples
from knnext.experiments.lab.figures import new_figure
from knnext.experiments.lab.recovery import Replacement
from knnext.experiments.lab.training import Schedule, log_p, train
from knnext.experiments.mixture_of_softmaxes import MixtureOfSoftmaxes, Variant, plot, variants
from knnext.experiments.run import run_experiment


def new(components, output=None, bias=None, train_output=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(6, 3, generator=generator) if output is None else output
    return MixtureOfSoftmaxes(output, bias, components, train_output, generator)


def test_it_is_the_formula():
    module = new(3, bias=torch.arange(6.0) / 6)
    h, targets = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), torch.arange(5)
    weights = (h @ module.gate.T + module.gate_bias).softmax(1)
    total = torch.zeros(5, 6)
    for i in range(3):
        context = h @ module.contexts[i].T + module.shifts[i]
        total += weights[:, i : i + 1] * (context @ module.output.T + module.bias).softmax(1)
    expected = total.gather(1, targets[:, None])[:, 0].log()
    torch.testing.assert_close(module((h,), targets), expected)
    # With gradient, the same values and the same slopes.
    ours = torch.autograd.grad(module((h,), targets).sum(), module.contexts)[0]
    theirs = torch.autograd.grad(expected.sum(), module.contexts)[0]
    torch.testing.assert_close(ours, theirs)


def test_the_output_matrix_stays_or_learns():
    examples = Examples((torch.randn(64, 3),), torch.arange(64) % 6)
    for train_output in (False, True):
        module = new(2, train_output=train_output)
        before = module.output.detach().clone()
        names = {n for n, p in module.named_parameters() if p.requires_grad}
        train(module, examples, examples, Schedule(3, 32, 0.01))
        assert ("output" in names) == train_output
        assert torch.equal(module.output.detach(), before) != train_output


def test_two_softmaxes_say_what_one_cannot():
    # Three words on a line, the middle one between the others: after state 0 either end comes and
    # never the middle, which one softmax must give as much as their mean.
    states = torch.tensor([[0.0], [3.0], [-3.0]]).repeat(64, 1)
    output = torch.tensor([[-1.0], [0.0], [1.0]])
    ends = torch.arange(64) % 2 * 2
    targets = torch.stack([ends, torch.full((64,), 2), torch.full((64,), 0)], 1).flatten()
    examples, losses = Examples((states,), targets), []
    for components in (1, 2):
        module = new(components, output)
        train(module, examples, examples, Schedule(200, 96, 0.1))
        losses.append(-float(log_p(module, examples).mean()))
    one, two = math.log(3) / 3, math.log(2) / 3  # a third of the states are 0
    assert losses[0] == pytest.approx(one, abs=0.03) and losses[1] == pytest.approx(two, abs=0.03)


def test_the_best_variant_is_chosen_without_the_test_split():
    spread = Interval(0.1, 0.2, 0.95)

    def replacement(gain, valid_nll):
        return Replacement([], torch.zeros(1), gain, spread, gain, spread, gain, valid_nll)

    lucky, good = (Variant("att", k, False) for k in (1, 2))
    found = [(lucky, replacement(0.9, 3.0)), (good, replacement(0.5, 2.0))]
    yardstick = SimpleNamespace(knn=None, difference=lambda _better, _worse: spread)
    said = mixture_of_softmaxes._verdict(found, yardstick, {})
    assert said["headline"].startswith("at best 50 %") and "k = 2" in said["words"]


@pytest.mark.slow
def test_it_runs_and_what_it_says_is_consistent(tiny_lab):
    result = run_experiment(
        "mixture-of-softmaxes",
        tiny_lab.preset,
        tiny_lab.folder,
        lab=tiny_lab,
        say=lambda _line: None,
    )
    every = variants(tiny_lab)
    assert len(result["rows"]) == len(every) + 1
    for variant, row in zip(every, result["rows"], strict=False):
        own = variant.components * (32 * 32 + 32 + 32 + 1)
        assert row["parameters"] == own + (512 * 32 if variant.train_output else 0)
        assert row["oracle"] <= row["mixture"]
    figure, axes = new_figure()
    plot(result, axes)
    assert len(axes.lines) == 5 and figure is axes.figure
