"""The rules by which figures agree with a claim."""

from __future__ import annotations

import math

import pytest

from knnext.evaluation.bootstrap import Interval
from knnext.experiments.lab.claims import exceeds, holds, negligible, no_gain, together


@pytest.mark.parametrize(
    ("low", "high", "better", "much", "little", "none"),
    [
        (0.02, 0.05, "agrees", "agrees", "disagrees", "disagrees"),
        (0.001, 0.009, "agrees", "disagrees", "agrees", "agrees"),
        (0.0, 0.009, "undecided", "disagrees", "agrees", "agrees"),
        (-0.02, 0.05, "undecided", "undecided", "undecided", "undecided"),
        (-0.05, -0.02, "disagrees", "disagrees", "disagrees", "agrees"),
        (-0.05, -0.002, "disagrees", "disagrees", "undecided", "agrees"),
        (0.005, 0.05, "agrees", "undecided", "undecided", "disagrees"),
        (math.nan, math.nan, "undecided", "undecided", "undecided", "undecided"),
    ],
)
def test_a_verdict_follows_from_the_interval(low, high, better, much, little, none):
    interval = Interval(low, high, 0.95)
    assert holds(interval) == better
    assert exceeds(interval) == much
    assert negligible(interval) == little
    assert no_gain(interval) == none


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (["agrees", "agrees"], "agrees"),
        (["undecided", "undecided"], "undecided"),
        (["agrees", "undecided"], "agrees in part"),
        (["agrees", "disagrees"], "agrees in part"),
        (["disagrees", "undecided"], "disagrees"),
        (["disagrees"], "disagrees"),
    ],
)
def test_parts_of_a_claim_are_joined(parts, whole):
    assert together(*parts) == whole
