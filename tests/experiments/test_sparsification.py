"""Cutting a distribution: against plain code, and where theory says if a cut can help."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from knnext.evaluation.bootstrap import Interval
from knnext.evaluation.perplexity import TextCounts
from knnext.experiments import sparsification
from knnext.experiments.lab.cut import cut, target_log_p
from knnext.experiments.lab.figures import new_figure
from knnext.experiments.lab.mixture import Split, by_name, mix, report
from knnext.experiments.run import run_experiment

VOCAB, DIM, COUNT = 30, 30, 3000


@pytest.fixture(scope="module")
def logits():
    return torch.randn(COUNT, VOCAB, generator=torch.Generator().manual_seed(0)) * 2


def cuts_of(logits, targets, kept):
    """With unit states and rows, logits are what the states say."""
    return cut(logits, torch.eye(VOCAB), None, targets, kept)


def drawn(log_p, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("kept", [1, 3, VOCAB - 1, VOCAB])
def test_cut_is_a_masked_softmax(logits, kept):
    targets = torch.arange(COUNT) % VOCAB
    found = cuts_of(logits, targets, (kept,))
    last = logits.topk(kept, 1).values[:, -1:]
    wanted = logits.double().masked_fill(logits < last, -torch.inf).log_softmax(1)
    torch.testing.assert_close(
        found.log_p[0], wanted.gather(1, targets[:, None])[:, 0], atol=1e-5, rtol=1e-5
    )
    p = logits.double().softmax(1)
    assert float(found.mass[0]) == pytest.approx(float(p.topk(kept, 1).values.sum(1).mean()))
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(1), atol=1e-5, rtol=1e-5)


def test_cut_takes_lower_ids_at_ties():
    found = cut(torch.zeros(3, VOCAB), torch.eye(VOCAB), None, torch.tensor([0, 4, 5]), (5, VOCAB))
    assert found.rank.tolist() == [0, 4, 5]
    assert found.log_p[0].exp().tolist() == pytest.approx([0.2, 0.2, 0])
    assert found.log_p[1].exp().tolist() == pytest.approx([1 / VOCAB] * 3)


def test_bias_counts():
    bias = torch.full((VOCAB,), -50.0)
    bias[7] = 0
    found = cut(torch.zeros(1, VOCAB), torch.eye(VOCAB), bias, torch.tensor([7]), (1,))
    assert found.log_p.item() == pytest.approx(0)


def test_kept_is_checked(logits):
    with pytest.raises(ValueError, match="kept must hold numbers from 1 to the 30"):
        cuts_of(logits, torch.zeros(COUNT, dtype=torch.int64), (0, 5))


def split_of(name, log_p, targets):
    documents = torch.arange(COUNT) * 50 // COUNT
    chosen = log_p.double().gather(1, targets[:, None])[:, 0]
    return Split(name, chosen, targets, documents, TextCounts(COUNT, None, None, 50))


def mixed(log_p, lm_log_p, kept):
    """Targets drawn from log_p; an LM that says lm_log_p, mixed with its own cut."""
    splits = [split_of(n, lm_log_p, drawn(log_p, seed)) for seed, n in enumerate(("valid", "test"))]
    parts = {s.name: cuts_of(lm_log_p, s.targets, (kept,)).log_p[0] for s in splits}
    return mix(*splits, by_name(splits, parts), resamples=200)


def test_an_honest_lm_gains_nothing(logits):
    log_p = logits.log_softmax(1)
    for kept in (3, 10):
        figures = mixed(log_p, log_p, kept)
        assert figures.lmbda < 0.05
        assert sparsification.judge(figures) == "agrees"


def test_an_lm_that_is_too_flat_gains(logits):
    """The experiment would see a gain where there is one."""
    figures = mixed((4 * logits).log_softmax(1), logits.log_softmax(1), 3)
    assert figures.gain > 0.05
    assert figures.interval.low > 0.01
    assert sparsification.judge(figures) == "disagrees"


def test_the_whole_vocabulary_is_the_lm(logits):
    log_p = logits.log_softmax(1)
    assert mixed(log_p, log_p, VOCAB).gain == pytest.approx(0, abs=1e-6)


def test_calibration_takes_the_gain_of_sharpness_away(logits):
    """The same flat LM, once its temperature is right, has nothing to gain from a cut."""
    states, targets = 4 * logits, drawn((4 * logits).log_softmax(1), 0)
    losses = {
        t: -float(target_log_p(logits, torch.eye(VOCAB), None, targets, t).mean())
        for t in (0.125, 0.25, 0.5, 1.0)
    }
    assert min(losses, key=losses.get) == 0.25
    found = target_log_p(logits, torch.eye(VOCAB), None, targets, 0.25)
    wanted = states.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    sharp = states.log_softmax(1)
    assert mixed(sharp, sharp, 3).gain < 0.005


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.2, -0.1, "agrees"),
        (-0.003, 0.004, "agrees"),
        (0.001, 0.004, "agrees"),
        (-0.1, 0.2, "undecided"),
        (0.005, 0.05, "disagrees"),
    ],
)
def test_verdicts(low, high, said):
    split = split_of("test", torch.zeros(COUNT, VOCAB), torch.zeros(COUNT, dtype=torch.int64))
    figures = report(split, split.log_p_lm, 0.5, resamples=2)
    assert sparsification.judge(replace(figures, interval=Interval(low, high, 0.95))) == said


@pytest.fixture(scope="module")
def result(tiny_lab):
    preset = replace(tiny_lab.preset, options={"sparsification.temperatures": (2.0,)})
    tiny_lab.preset = preset
    try:
        yield run_experiment(
            "sparsification", preset, tiny_lab.folder, lab=tiny_lab, say=lambda _line: None
        )
    finally:
        tiny_lab.preset = replace(preset, options={})


def test_a_tiny_run(result):
    *rows, knn = result["rows"]
    assert knn["kept"] == "kNN-LM"
    plain, sharp = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    for part in (plain, sharp):
        assert [r["kept"] for r in part] == [str(2**i) for i in range(10)]
        assert part[-1]["perplexity"] == pytest.approx(part[-1]["alone"], rel=1e-6)
        masses = [r["probability kept"] for r in part]
        assert masses == sorted(masses)
        assert masses[-1] == pytest.approx(1)
    for row in result["rows"]:
        assert row["oracle"] <= row["perplexity"] + 1e-9
        assert list(row) == list(knn)


def test_the_lm_as_it_is_is_the_shared_one(result, tiny_lab):
    series = sparsification.mix_cuts(tiny_lab, 1.0)
    for mine, shared in zip(series.splits, tiny_lab.splits(), strict=True):
        torch.testing.assert_close(mine.log_p_lm, shared.log_p_lm, atol=1e-4, rtol=0)
    t = sparsification.calibrate(tiny_lab)
    calibrated = sparsification.mix_cuts(tiny_lab, t).splits[0]
    assert calibrated.log_p_lm.mean() >= series.splits[0].log_p_lm.mean()
    assert result["details"]["LM temperature"] == t


def test_the_figure_draws(result):
    _, axes = new_figure()
    sparsification.plot(result, axes)
    assert len(axes.lines) == 3
