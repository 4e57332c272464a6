"""Ensembles: weights where they are known, what adds nothing, and a tiny run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from knnext.evaluation.bootstrap import Interval
from knnext.evaluation.perplexity import TextCounts
from knnext.experiments import ensembling
from knnext.experiments.ensembling import L2, LM, METRICS, OTHER, QUESTIONS, SYSTEMS, mix_system
from knnext.experiments.lab.contrast import Gain
from knnext.experiments.lab.figures import new_figure
from knnext.experiments.lab.mixture import Split, fit_weights
from knnext.experiments.run import run_experiment

COUNT, VOCAB = 4000, 20


def draw(weights, seed):
    """Targets drawn from a mixture of three distributions a token; their log p, (3, n)."""
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(3, COUNT, VOCAB, generator=generator, dtype=torch.float64) * 2).softmax(-1)
    mixture = (torch.tensor(weights, dtype=torch.float64)[:, None, None] * p).sum(0)
    targets = torch.multinomial(mixture, 1, generator=generator)[:, 0]
    return p.log().gather(2, targets.expand(3, -1)[:, :, None])[..., 0], targets


def split_of(name, log_p, targets):
    documents = torch.arange(COUNT) * 40 // COUNT
    return Split(name, log_p, targets, documents, TextCounts(COUNT, COUNT // 2, None, 40))


@pytest.fixture(scope="module")
def planted():
    drawn = {name: draw((0.5, 0.3, 0.2), seed) for seed, name in enumerate(("valid", "test"))}
    splits = [split_of(name, log_ps[0], targets) for name, (log_ps, targets) in drawn.items()]
    parts = [{name: log_ps[i] for name, (log_ps, _) in drawn.items()} for i in range(3)]
    return splits, parts


def test_weights_are_those_that_the_targets_were_drawn_with(planted):
    splits, parts = planted
    weights = mix_system(parts, *splits).weights
    torch.testing.assert_close(
        weights, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), atol=0.04, rtol=0
    )
    assert float(weights.sum()) == pytest.approx(1)


def test_each_component_that_is_real_adds(planted):
    splits, parts = planted
    one, two, three = (mix_system(parts[:m], *splits) for m in (1, 2, 3))
    assert one.valid_nll > two.valid_nll > three.valid_nll
    assert one.log_p.mean() < two.log_p.mean() < three.log_p.mean()
    torch.testing.assert_close(one.log_p, splits[1].log_p_lm)


def test_a_copy_adds_nothing(planted):
    splits, parts = planted
    two = mix_system(parts[:2], *splits)
    three = mix_system([*parts[:2], parts[1]], *splits)
    torch.testing.assert_close(three.log_p, two.log_p, atol=1e-4, rtol=0)
    assert float(three.weights[1:].sum()) == pytest.approx(float(two.weights[1]), abs=1e-3)


def test_a_component_without_some_targets(planted):
    """A kNN gives most tokens 0: no nan, and no weight where it is never right."""
    splits, parts = planted
    holes = {
        n: torch.where(torch.arange(COUNT) % 2 == 0, p, -math.inf) for n, p in parts[1].items()
    }
    mixed = mix_system([parts[0], holes], *splits)
    assert mixed.log_p.isfinite().all()
    nothing = {n: torch.full_like(p, -math.inf) for n, p in parts[1].items()}
    alone = mix_system([parts[0], nothing], *splits)
    assert float(alone.weights[1]) < 1e-6
    torch.testing.assert_close(alone.log_p, splits[1].log_p_lm, atol=1e-5, rtol=0)


def test_the_papers_way_is_never_worse_on_the_split_it_tunes_on(planted):
    splits, parts = planted
    found = mix_system(parts, *splits)
    assert found.paper <= math.exp(-2 * float(found.log_p.mean())) + 1e-6  # two tokens a word


def test_fit_weights_meets_the_conditions_of_an_optimum(planted):
    """Kuhn-Tucker on the simplex: every component's mean share of p is 1 where it has weight, and
    no more than 1 where it has none."""
    _, parts = planted
    log_ps = torch.stack([p["valid"] for p in parts])
    weights = fit_weights(log_ps)
    shares = (log_ps - torch.logsumexp(log_ps + weights.log()[:, None], 0)).exp().mean(1)
    torch.testing.assert_close(shares, torch.ones(3, dtype=torch.float64), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def result(tiny_lab):
    preset = replace(tiny_lab.preset, options={"ensembling.temperatures": (2.0, 8.0)})
    tiny_lab.preset = preset
    try:
        yield run_experiment(
            "ensembling", preset, tiny_lab.folder, lab=tiny_lab, say=lambda _line: None
        )
    finally:
        tiny_lab.preset = replace(preset, options={})


def test_a_tiny_run(result, tiny_lab):
    assert [r["mixture"] for r in result["rows"]] == [" + ".join(names) for names in SYSTEMS]
    assert list(result["series"]["answers"]) == [METRICS, *(name for name, _, _ in QUESTIONS)]
    for row, names in zip(result["rows"], SYSTEMS, strict=True):
        weights = {n: row[f"weight of {n}"] for n in names}
        assert sum(weights.values()) == pytest.approx(1)
        assert sum(row[f"weight of {n}"] is not None for n in (LM, OTHER, L2, "kNN ip")) == len(
            names
        )
    first, second = (tiny_lab.split("test", tiny_lab.lm(seed)) for seed in (0, 1))
    assert torch.equal(first.targets, second.targets)  # or nothing could be mixed token by token
    assert not torch.equal(first.log_p_lm, second.log_p_lm)


def test_words_say_what_is_missing_and_no_share_of_nothing():
    gain = Gain(0.1, Interval(0.05, 0.15, 0.95))
    none = Gain(0.0, Interval(-0.1, 0.1, 0.95))
    both = {"kNN added to the LM": gain, "kNN added to both LMs": gain}
    assert "adds 100% of what" in ensembling._words(both)
    assert "of what it adds" not in ensembling._words({**both, "kNN added to the LM": none})
    assert "no second one" in ensembling._words({"kNN added to the LM": gain})


def test_the_figure_draws(result):
    figure, axes = new_figure()
    ensembling.plot(result, axes)
    assert len(axes.patches) == len(QUESTIONS) + 1
    assert figure.axes == [axes]
