"""learned-embedding: shares of planted components, the verdict's rule, and the tiny run."""

from __future__ import annotations

import math

import pytest
import torch

from knnext.evaluation.bootstrap import Interval
from knnext.experiments.lab.figures import new_figure
from knnext.experiments.lab.recovery import (
    Replacement,
    Yardstick,
    settled,
    share_text,
    still_falling,
)
from knnext.experiments.learned_embedding import judge, plot
from knnext.experiments.run import run_experiment


def replacement(share, low, high, gain_low=0.1):
    spread = Interval(low, high, 0.95)
    return Replacement([], torch.zeros(0), 0.2, Interval(gain_low, 0.3, 0.95), share, spread, 0.0)


@pytest.mark.parametrize(
    ("share", "low", "high", "expected"),
    [
        (0.55, 0.4, 0.7, "agrees"),
        (0.41, 0.3, 0.5, "agrees"),
        (0.5, -0.1, 1.1, "undecided"),
        (0.25, 0.1, 0.4, "agrees in part"),
        (0.85, 0.7, 0.97, "agrees in part"),
        (0.85, 0.7, 1.1, "disagrees"),
        (0.05, -0.1, 0.2, "disagrees"),
        (math.nan, math.nan, math.nan, "disagrees"),
    ],
)
def test_the_verdict_follows_from_the_share(share, low, high, expected):
    knn = replacement(1, 1, 1)
    assert judge(replacement(share, low, high), knn) == expected
    assert judge(replacement(share, low, high), replacement(1, 1, 1, gain_low=-0.1)) == "undecided"


def test_a_share_is_the_ratio_of_gains(tiny_lab):
    yardstick = Yardstick(tiny_lab)
    assert yardstick.knn.share == 1
    assert yardstick.knn.share_interval.low == yardstick.knn.share_interval.high == 1
    assert yardstick.knn.paper_share == 1

    def nothing(name, _temperature):
        return tiny_lab.split(name).log_p_lm

    none = yardstick.measure([nothing, nothing])
    assert none.gain == pytest.approx(0, abs=1e-12) == none.share
    assert none.valid_nll == pytest.approx(-float(tiny_lab.split("valid").log_p_lm.mean()))
    assert yardstick.knn.valid_nll < none.valid_nll
    assert none.row(component="x")["recovers"].startswith("0 %")

    # p_lm^(1/2) gives every target more: alone, its gain is half of the loss of the base.
    def half(name, _temperature):
        return tiny_lab.split(name).log_p_lm / 2

    alone = yardstick.measure([half], lmbda=1)
    assert alone.gain == pytest.approx(math.log(yardstick.base) / 2)
    assert alone.mixtures[0].lmbda == 1 and alone.mean("alone") == alone.mean("mixture")
    assert alone.share == pytest.approx(alone.gain / yardstick.knn.gain)
    assert alone.paper("mixture") == alone.paper("alone")


def test_an_interval_holds_its_share(tiny_lab):
    yardstick = Yardstick(tiny_lab)

    def part(name, _temperature):
        split = tiny_lab.split(name)
        return torch.where(split.targets % 3 == 0, split.log_p_lm / 2, split.log_p_lm)

    found = yardstick.measure([part])
    assert found.share_interval.low < found.share < found.share_interval.high
    assert share_text(0.5, Interval(0.4, 0.6, 0.95)) == "50 % [40, 60]"
    assert share_text(0.5, Interval(math.nan, math.nan, 0.95)) == "50 %"


def test_what_had_not_settled_is_named():
    trainings = {"att": {"converged": True}, "ffn": {"converged": False}}
    assert "ffn" in still_falling(trainings) and "att" not in still_falling(trainings)
    assert still_falling({"att": {"converged": True}}) == ""
    assert "4 of 5" in still_falling({str(i): {"converged": i == 0} for i in range(5)})


@pytest.mark.slow
def test_it_runs_and_what_it_says_is_consistent(tiny_lab):
    lines: list[str] = []
    result = run_experiment(
        "learned-embedding", tiny_lab.preset, tiny_lab.folder, lab=tiny_lab, say=lines.append
    )
    assert len(result["rows"]) == 3 and len({tuple(row) for row in result["rows"]}) == 1
    base = Yardstick(tiny_lab).base
    for row in result["rows"]:
        assert 0 <= row["lmbda"] <= 1 and row["oracle"] <= row["mixture"]
    for layer in ("att", "ffn"):
        detail = result["details"][layer]
        assert detail["setting"]["w_ds"] == "embedding" and detail["setting"]["h_ds"] == layer
        assert len(detail["mixtures"]) == len(tiny_lab.preset.seeds)
        losses = [h["valid"] for h in detail["training"]["history"][0]]
        assert losses[-1] < losses[0]
        mean = math.log(base) - sum(math.log(m["mixture"]) for m in detail["mixtures"]) / 2
        assert detail["gain"] == pytest.approx(mean)
    figure, axes = new_figure()
    plot(result, axes)
    assert len(axes.patches) == 3 and figure is axes.figure


@pytest.mark.parametrize(
    ("given", "converged", "wanted"),
    [
        ("agrees", True, "agrees"),
        ("agrees", False, "agrees in part"),
        ("disagrees", False, "disagrees"),
        ("undecided", False, "undecided"),
    ],
)
def test_no_verdict_rests_on_training_that_had_not_settled(given, converged, wanted):
    trainings = {"a": {"converged": True}, "b": {"converged": converged}}
    assert settled(given, trainings) == wanted
