"""Rates, times and sizes as people read them."""

from __future__ import annotations

from knnext.planning.rates import NAMES

_SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_UNITS = ((365.25 * 86400, "years"), (86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def rate_text(name: str, value: float) -> str:
    """``"4.08 TB/s"`` of a rate by its name."""
    unit = NAMES[name][0]
    return duration(value) if unit == "s" else f"{scaled(value)}{unit}"


def scaled(value: float) -> str:
    """``"4.08 T"``: three digits and a power of 1000."""
    scale, letter = next(((s, n) for s, n in _SCALES if value >= s), (1.0, ""))
    return f"{value / scale:.3g} {letter}" if value < 1e18 else f"{value:.3g} "


def duration(seconds: float | None) -> str:
    """``"2.5 h"``; "not known" for None."""
    if seconds is None:
        return "not known"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"
    # 59.97 min are an hour: what is shown is rounded to three digits.
    scale, unit = next((s, n) for s, n in _UNITS if seconds >= 0.9995 * s)
    return (
        f"{seconds / scale:,.3g} {unit}"
        if seconds / scale < 1e3
        else f"{seconds / scale:,.0f} {unit}"
    )
