"""objectives: the losses written out, the weights of planted wins, no row as its own neighbor."""

from __future__ import annotations

import math

import pytest
import torch

from knnext.experiments.lab.examples import Examples
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.figures import new_figure
from knnext.experiments.lab.leave_one_out import row_neighbors
from knnext.experiments.lab.recovery import Yardstick
from knnext.experiments.lab.training import Schedule, nll, train
from knnext.experiments.lab.word_rows import WordRows, even_layout
from knnext.experiments.objectives import class_weights, interpolated, knn_wins, plot, weighted
from knnext.experiments.run import run_experiment


def examples(count, **extra):
    return Examples((torch.eye(count),), torch.arange(count), extra)


def test_the_interpolated_loss_is_that_of_the_mixture_and_moves_p_ds_alone():
    log_p = torch.tensor([0.5, 0.1, 1e-6], dtype=torch.float64).log().requires_grad_()
    lm = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64).log().requires_grad_()
    loss = interpolated(log_p, examples(3, log_p_lm=lm.detach()))
    p = 0.75 * lm.exp() + 0.25 * log_p.exp()
    assert loss.item() == pytest.approx(-p.log().mean().item())
    loss.backward()
    # d/d log p_ds: minus the share of P_ds in the mixture; little where the LM is sure.
    torch.testing.assert_close(log_p.grad, -(0.25 * log_p.exp() / p).detach() / 3)
    assert lm.grad is None and abs(log_p.grad[2]) < 1e-6


def test_what_the_lm_knows_is_left_to_it():
    # Both words follow the only state equally; the LM is sure of word 0 where it comes.
    state = torch.ones(200, 1)
    targets = torch.arange(200) % 2
    lm = torch.where(targets == 0, 0.999, 0.001).log()
    probabilities = []
    for loss in (nll, interpolated):
        module = WordRows(even_layout(2, 1), 1, torch.Generator().manual_seed(0))
        data = Examples((state,), targets, {"log_p_lm": lm})
        train(module, data, data, Schedule(150, 100, 0.1), loss=loss)
        probabilities.append(float(module.rows.detach()[:, 0].softmax(0)[1]))
    assert probabilities[0] == pytest.approx(0.5, abs=0.05) and probabilities[1] > 0.7


def test_the_weighted_loss_is_torchs():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    targets, weight = torch.tensor([0, 1, 2, 3, 3, 0]), torch.tensor([1.0, 2.0, 1.5, 1.2])
    log_p = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    data = Examples((logits,), targets, {"weight": weight[targets]})
    expected = torch.nn.functional.cross_entropy(logits, targets, weight)
    torch.testing.assert_close(weighted(log_p, data), expected)


def test_a_words_weight_is_one_and_its_share_of_wins():
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    wins = torch.tensor([True, False, False, False, True, True, False])
    found = class_weights(wins, targets, 4).tolist()
    assert found == pytest.approx([1.25, 2.0, 1.0, 1 + 3 / 7])  # the last was not sampled


def test_no_row_is_its_own_neighbor(tiny_lab):
    train = tiny_lab.train_states("att")
    rows = torch.arange(0, 2000, 50)
    near = row_neighbors(tiny_lab, rows, 8, Setting())
    distances = torch.cdist(train.keys[rows].double(), train.keys.double()).square()
    distances[torch.arange(len(rows)), rows] = math.inf
    expected = distances.topk(8, largest=False).values.sort(1).values
    torch.testing.assert_close(near.distances.double(), expected, atol=1e-2, rtol=1e-3)


def test_wins_compare_the_kNN_without_the_row_with_the_lm(tiny_lab):
    yardstick = Yardstick(tiny_lab)
    wins, targets = knn_wins(tiny_lab, yardstick)
    assert wins.shape == targets.shape == (min(8192, len(tiny_lab.store())),)
    assert 0.05 < float(wins.double().mean()) < 0.95


@pytest.mark.slow
def test_it_runs_and_what_it_says_is_consistent(tiny_lab):
    result = run_experiment(
        "objectives", tiny_lab.preset, tiny_lab.folder, lab=tiny_lab, say=lambda _line: None
    )
    assert len(result["rows"]) == 11
    for row in result["rows"]:
        assert row["oracle"] <= row["mixture"] and 0 <= row["lmbda"] <= 1
    # The plain runs are those of multi-embedding, by the same keys.
    again = result["details"]["cross-entropy, att, n = 1"]["gain"]
    other = run_experiment(
        "multi-embedding", tiny_lab.preset, tiny_lab.folder, lab=tiny_lab, say=lambda _line: None
    )
    assert again == other["details"]["att, 1 a word"]["gain"]
    figure, axes = new_figure()
    plot(result, axes)
    assert len(axes.patches) == 10 and figure is axes.figure
