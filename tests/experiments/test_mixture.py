"""The statistics that every experiment rests on, against planted answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from knnext.evaluation.perplexity import TextCounts
from knnext.experiments.lab.mixture import (
    FLOOR,
    Split,
    by_name,
    difference,
    fit,
    fit_lmbda,
    fit_weights,
    mix,
    mix_many,
    paper_way,
    seed_interval,
)


def make_split(name: str, log_p: torch.Tensor, documents: int = 10, words: int | None = None):
    ids = torch.arange(log_p.numel()) * documents // log_p.numel()
    counts = TextCounts(log_p.numel(), words, None, documents)
    return Split(name, log_p.double(), torch.zeros(log_p.numel(), dtype=torch.int64), ids, counts)


def coin(n: int, heads: float) -> torch.Tensor:
    """Exactly a share `heads` of n tokens are heads, spread over the stream."""
    flips = torch.zeros(n, dtype=torch.bool)
    flips[: round(n * heads)] = True
    return flips[torch.randperm(n, generator=torch.Generator().manual_seed(0))]


def test_lmbda_of_a_planted_mixture():
    # One model knows heads, the other tails: the best weight is the share of tails.
    heads = coin(10_000, 0.7)
    first = torch.where(heads, 0.9, 0.1).double().log()
    second = torch.where(heads, 0.1, 0.9).double().log()
    lmbda, nll = fit_lmbda(first, second)
    # (1 - l) 0.9 + l 0.1 = 0.7 gives l = 0.25
    assert lmbda == pytest.approx(0.25, abs=1e-3)
    assert nll == pytest.approx(-(0.7 * math.log(0.7) + 0.3 * math.log(0.3)), abs=1e-6)


@pytest.mark.parametrize(("p_other", "wanted"), [(0.1, 0.0), (0.9, 1.0)])
def test_lmbda_at_the_ends(p_other, wanted):
    base = torch.full((100,), math.log(0.5), dtype=torch.float64)
    lmbda, nll = fit_lmbda(base, torch.full((100,), math.log(p_other), dtype=torch.float64))
    assert lmbda == wanted
    assert nll == pytest.approx(-math.log(max(0.5, p_other)))


def test_lmbda_with_impossible_targets():
    # Half of the targets are impossible for the component, half certain: 1 - l = l at the best.
    base = torch.full((100,), math.log(1e-6), dtype=torch.float64)
    other = torch.zeros(100, dtype=torch.float64)
    other[::2] = -math.inf
    lmbda, _ = fit_lmbda(base, other)
    assert lmbda == pytest.approx(0.5, abs=1e-3)


def test_fit_finds_the_temperature_it_was_made_with():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    targets = torch.multinomial((logits / 2).softmax(1), 1, generator=generator).squeeze(1)

    def log_p(_name: str, temperature: float) -> torch.Tensor:
        scaled = (logits / temperature).log_softmax(1)
        return scaled.gather(1, targets[:, None]).squeeze(1)

    valid = make_split("valid", torch.full((4000,), math.log(1 / 8)))
    temperature, lmbda, _ = fit(valid, log_p, (0.5, 1.0, 1.5, 2.0, 3.0, 4.0))
    assert temperature == 2.0
    assert lmbda > 0.9


def test_mix_fits_on_valid_and_reports_test():
    heads = {"valid": coin(2000, 0.7), "test": coin(4000, 0.5)}
    first = {n: torch.where(h, 0.9, 0.1).double().log() for n, h in heads.items()}
    second = {n: torch.where(h, 0.1, 0.9).double().log() for n, h in heads.items()}
    valid, test = (make_split(n, first[n]) for n in ("valid", "test"))
    found = mix(valid, test, by_name((valid, test), second), resamples=50)
    assert found.lmbda == pytest.approx(0.25, abs=2e-3)  # valid's, not test's 0.5
    expected = -(0.5 * math.log(0.7) + 0.5 * math.log(0.3))
    assert math.log(found.mixture) == pytest.approx(expected, abs=2e-3)
    assert found.paper["lmbda"] == pytest.approx(0.5, abs=5e-3)  # the paper's way tunes on test
    assert found.oracle < found.mixture < found.base
    assert found.interval.low < found.gain < found.interval.high
    assert found.wins == 0.5


def test_paper_way_counts_words_and_floors():
    base = torch.full((100,), math.log(0.25))
    split = make_split("test", base, words=50)
    other = torch.full((100,), math.log(0.5), dtype=torch.float64)
    other[0] = -math.inf
    found = paper_way(split, lambda _n, _t: other)
    assert found["per"] == "word"
    assert found["base"] == pytest.approx(16.0)  # 100 tokens of log 4 over 50 words
    assert found["alone"] == pytest.approx(math.exp((99 * math.log(2) - FLOOR) / 50))
    assert 0.9 < found["lmbda"] < 1


def test_difference_is_paired():
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(1000, generator=generator).double()  # shared by both, so it cancels
    split = make_split("test", noise)
    interval = difference(split, noise + 0.1, noise, resamples=200)
    assert interval.low == pytest.approx(0.1)
    assert interval.high == pytest.approx(0.1)


def test_difference_of_something_infinite_has_no_interval():
    log_p = torch.zeros(10, dtype=torch.float64)
    bad = log_p.clone()
    bad[3] = -math.inf
    assert math.isnan(difference(make_split("test", log_p), bad, log_p).low)


def test_weights_on_the_simplex():
    # Three models that each know one of three kinds of token: the weights are the shares.
    kinds = torch.tensor([0] * 500 + [1] * 300 + [2] * 200)
    log_ps = torch.where(kinds == torch.arange(3)[:, None], 1.0, 1e-9).double().log()
    weights = fit_weights(log_ps)
    np.testing.assert_allclose(weights.numpy(), [0.5, 0.3, 0.2], atol=1e-6)
    mixed = mix_many(log_ps, weights)
    np.testing.assert_allclose(mixed[0].exp(), 0.5, atol=1e-6)


def test_weights_agree_with_the_pairwise_fit():
    heads = coin(5000, 0.7)
    log_ps = torch.stack(
        [torch.where(heads, 0.9, 0.1).double().log(), torch.where(heads, 0.1, 0.9).double().log()]
    )
    assert float(fit_weights(log_ps)[1]) == pytest.approx(fit_lmbda(*log_ps)[0], abs=1e-3)


def test_seed_interval():
    found = seed_interval([1.0, 2.0, 3.0])
    assert (found["mean"], found["std"], found["seeds"]) == (2.0, 1.0, 3)
    assert math.isnan(seed_interval([1.0])["std"])
