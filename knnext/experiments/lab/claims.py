"""Whether figures agree with a claim: rules that experiments share, so that no verdict is typed in.

An interval is of a difference in log perplexity, positive where the claim says it should be.
"""

from __future__ import annotations

import math

from knnext.evaluation.bootstrap import Interval
from knnext.experiments.lab.results import Agreement

MARGIN = 0.01  # in log perplexity: what differs by less than 1 % differs little


def holds(interval: Interval) -> Agreement:
    """Of "this is better than that": the interval lies above zero, below it, or across it."""
    if not _known(interval) or interval.low <= 0 <= interval.high:
        return "undecided"
    return "agrees" if interval.low > 0 else "disagrees"


def exceeds(interval: Interval, margin: float = MARGIN) -> Agreement:
    """Of "this is much better than that": by more than the margin, by less, or it is not known."""
    if not _known(interval) or interval.low <= margin <= interval.high:
        return "undecided"
    return "agrees" if interval.low > margin else "disagrees"


def negligible(interval: Interval, margin: float = MARGIN) -> Agreement:
    """Of "this matters little": the interval lies within the margin, outside it, or across it."""
    if not _known(interval):
        return "undecided"
    if -margin < interval.low and interval.high < margin:
        return "agrees"
    return "disagrees" if interval.low > margin or interval.high < -margin else "undecided"


def no_gain(interval: Interval, margin: float = MARGIN) -> Agreement:
    """Of "this brings no gain": below the margin for sure; above zero for sure and perhaps above
    the margin; or it is not known."""
    if not _known(interval):
        return "undecided"
    if interval.high < margin:
        return "agrees"
    return "disagrees" if interval.low > 0 else "undecided"


def together(*parts: Agreement) -> Agreement:
    """Of several parts: what all say; in part, where one agrees at least; else that they do not."""
    if len(set(parts)) == 1:
        return parts[0]
    if "agrees" in parts or "agrees in part" in parts:
        return "agrees in part"
    return "disagrees"


def _known(interval: Interval) -> bool:
    return math.isfinite(interval.low) and math.isfinite(interval.high)
