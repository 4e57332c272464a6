"""Contrasts between components: planted advantages of known size."""

from __future__ import annotations

import math

import pytest
import torch

from knnext.evaluation.bootstrap import Interval
from knnext.evaluation.perplexity import TextCounts
from knnext.experiments.lab.contrast import (
    Gain,
    advantage,
    difference_in_differences,
    fit_component,
    tabulate,
)
from knnext.experiments.lab.mixture import Split

DOCUMENTS, EACH = 30, 20


def make_split(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = DOCUMENTS * EACH
    log_p = (torch.rand(count, generator=generator, dtype=torch.float64) * 0.5 + 0.1).log()
    documents = torch.arange(DOCUMENTS).repeat_interleave(EACH)
    counts = TextCounts(count, count // 2, count * 4, DOCUMENTS)
    return Split(name, log_p, torch.zeros(count, dtype=torch.int64), documents, counts)


@pytest.fixture(scope="module")
def splits():
    return make_split("valid", 1), make_split("test", 2)


def noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(DOCUMENTS * EACH, generator=generator, dtype=torch.float64) - 3


def test_an_advantage_that_every_token_has_is_certain(splits):
    worse = noise(0)
    gain = advantage(splits[1], worse + 0.25, worse)
    assert gain.value == pytest.approx(0.25)
    assert gain.interval.low == pytest.approx(0.25)
    assert gain.interval.high == pytest.approx(0.25)


def test_an_interval_holds_what_it_should(splits):
    """Where there is no advantage, about one in twenty intervals says that there is one."""
    gains = [advantage(splits[1], noise(s), noise(1000 + s), 200) for s in range(60)]
    held = sum(g.interval.low <= 0 <= g.interval.high for g in gains)
    assert 51 <= held <= 60


def test_difference_in_differences_takes_out_what_both_have(splits):
    base, other = noise(3), noise(4)
    treated = (base + 0.3 + other, base)
    control = (base - 0.1 + other, base)
    gain = difference_in_differences(splits[1], treated, control)
    # The noise that the two pairs share is gone; each pair alone is far less certain.
    assert gain.value == pytest.approx(0.4)
    assert gain.interval.low == pytest.approx(0.4)
    alone = advantage(splits[1], *treated)
    assert alone.interval.high - alone.interval.low > 0.05


def test_fit_component_finds_the_planted_temperature(splits):
    """The component is the LM's own probability to the power 1, and worse at other t."""
    by = {s.name: s.log_p_lm for s in splits}
    component = lambda name, t: by[name] + 0.5 - abs(math.log(t))  # noqa: E731
    fitted = fit_component(*splits, component, (0.25, 1.0, 4.0), resamples=50)
    assert fitted.mixture.temperature == 1.0
    assert fitted.mixture.lmbda == pytest.approx(1.0)
    assert fitted.mixture.gain == pytest.approx(0.5)
    assert fitted.curve[1.0] == pytest.approx(fitted.mixture.mixture)
    # Elsewhere the component is worse than the LM everywhere, and no weight is best.
    assert fitted.curve[4.0] == pytest.approx(fitted.mixture.base)
    torch.testing.assert_close(fitted.log_p, by["test"] + 0.5)
    assert fitted.mixture.paper["temperature"] == 1.0


def test_tabulate_asks_once(splits):
    asked = []

    def component(name, t):
        asked.append((name, t))
        return torch.zeros(1)

    known = tabulate(component, splits, (1.0, 2.0))
    known("test", 2.0), known("test", 2.0)
    assert sorted(asked) == [("test", 1.0), ("test", 2.0), ("valid", 1.0), ("valid", 2.0)]


def test_gain_is_printed_as_a_change_of_perplexity():
    gain = Gain(-math.log(0.9), Interval(-0.1, 0.2, 0.95))
    assert str(gain) == "-10.0 % [-18.1, +10.5]"
