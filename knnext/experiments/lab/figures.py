"""The look that the experiments' figures share. matplotlib is loaded when one is made."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from knnext.errors import missing_package
from knnext.report.colors import GRID, INK, MUTED, SHADES

__all__ = [
    "CHANGE_LABEL",
    "COLORS",
    "GAIN_LABEL",
    "GRID",
    "INK",
    "MARKERS",
    "METRICS",
    "MUTED",
    "PALE",
    "PALE_OVER",
    "STATES",
    "STATES_NOTE",
    "STRONG",
    "bars",
    "dress",
    "legend_below",
    "legend_of_all",
    "line",
    "look",
    "new_figure",
    "note",
    "percent_change",
    "plain_ticks",
    "reference_line",
    "searched",
]

#: Blue and orange are the pages'. The first four, which are ways of searching, stay apart in every
#: common form of colour blindness; a series has a mark of its own besides.
COLORS = ("#1f5fa8", "#d9710f", "#1a9c7e", "#3b1e54", "#c99700", "#1098ad", "#b03060", "#495057")
#: Bars of what helps, of what harms, and of the datastore that both are measured by.
PALE, PALE_OVER, STRONG = SHADES[6], "#f4b877", SHADES[3]
#: How neighbors were found and scored, by (mask, score), as every figure says it.
_SEARCHED = {
    ("exact", "real"): "true neighbors, real distances",
    ("exact", "faiss"): "true neighbors, FAISS's distances",
    ("faiss", "real"): "FAISS's neighbors, real distances",
    ("faiss", "faiss"): "FAISS's neighbors and distances",
}
#: Of those, one colour and one mark in every figure.
_LOOKS = {
    ("exact", "real"): (COLORS[0], "o"),
    ("faiss", "faiss"): (COLORS[1], "s"),
    ("faiss", "real"): (COLORS[2], "^"),
    ("exact", "faiss"): (COLORS[3], "D"),
}
#: What the experiments' names of layers and metrics mean.
STATES = {"att": COLORS[0], "ffn": COLORS[5]}
STATES_NOTE = "att: what the last feed-forward block reads. ffn: what the output layer reads."
METRICS = {"l2": "squared distances", "ip": "inner products"}
GAIN_LABEL = "gain in log perplexity over the LM alone (test), nats per token"
CHANGE_LABEL = "change of perplexity against the LM alone (test), %"
_LETTERS_AN_INCH = 14  # of the notes
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def new_figure(width: float = 7.2, height: float = 4.6) -> tuple[Any, Any]:
    """(Figure, Axes) without touching matplotlib's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_package("figures need", "matplotlib", "lm") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def dress(axes: Any, *, title: str, xlabel: str, ylabel: str, legend: bool = True) -> None:
    """Labels, grid and legend in the house's style."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(xlabel, color=MUTED)
    axes.set_ylabel(ylabel, color=MUTED)
    axes.tick_params(colors=MUTED)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def searched(mask: str, score: str) -> str:
    """A way of searching in words: who chooses the neighbors, and whose distances count."""
    return _SEARCHED[mask, score]


def look(mask: str, score: str) -> dict[str, Any]:
    """Colour and mark of a way of searching, for `plot`."""
    color, marker = _LOOKS[mask, score]
    return {"color": color, "marker": marker}


def legend_below(axes: Any, columns: int = 2) -> None:
    """The legend under the axis, where it covers no curve."""
    axes.legend(
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        ncols=columns,
        columnspacing=1.2,
        handlelength=1.8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
    )


def legend_of_all(figure: Any, axes: Any) -> None:
    """One legend for all panels, above them, from the series of one of them."""
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        ncols=3 if figure.get_figwidth() > 9 else 2,
    )


def note(figure: Any, text: str) -> None:
    """Sentences on how to read the picture, at its foot, in lines as wide as it is by now."""
    width = int(_LETTERS_AN_INCH * figure.get_figwidth())
    lines = [textwrap.fill(part, width) for part in text.splitlines()]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color=MUTED)


def plain_ticks(axis: Any) -> None:
    """Numbers as they are said, 0.1 or 4,096, in place of powers."""
    axis.set_major_formatter(lambda value, _: f"{value:,.12g}".replace("-", "−"))
    axis.set_minor_formatter(lambda value, _: "")


def percent_change(log_gain: float) -> float:
    """A gain in log perplexity as a change of perplexity in percent: 0.1 becomes -9.5."""
    return 100 * math.expm1(-log_gain)


def line(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float | None],
    label: str,
    number: int = 0,
    **style: Any,
) -> None:
    """One series, in a colour and mark by number where `style` has none; None leaves a gap."""
    usual = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
    axes.plot(
        x,
        [float("nan") if value is None else value for value in y],
        label=label,
        **{**usual, "markersize": 5, "linewidth": 1.6, **style},
    )


def reference_line(axes: Any, y: float, label: str) -> None:
    """A dashed level, such as the base LM's perplexity."""
    axes.axhline(y, color=MUTED, linewidth=1.0, linestyle="--", label=label)


def bars(
    axes: Any,
    labels: Sequence[str],
    values: Sequence[float | None],
    intervals: Sequence[tuple[float | None, float | None]] | None = None,
    *,
    good: int = -1,
    digits: int = 1,
    standard: str | None = None,
) -> None:
    """Horizontal bars, first on top, with intervals as whiskers, and all of it in numbers beside.

    Args:
        good: the sign of what helps: -1 for changes of perplexity, 1 for gains.
        digits: behind the point.
        standard: the label whose bar the others are measured by.
    """
    places = list(range(len(labels)))[::-1]
    shown = [0.0 if value is None else value for value in values]
    fills = [PALE if good * value >= 0 else PALE_OVER for value in shown]
    fills = [STRONG if n == standard else fill for n, fill in zip(labels, fills, strict=True)]
    axes.barh(places, shown, color=fills, height=0.62)
    beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8}
    spans = intervals or [(None, None)] * len(places)
    for place, value, (low, high) in zip(places, values, spans, strict=True):
        text = "–" if value is None else _signed(value, digits, good)
        if value is not None and low is not None and high is not None:
            ends = sorted((low, high))
            axes.plot(ends, [place, place], color=INK, linewidth=1.4)
            axes.plot([value], [place], "|", color=INK)
            text += f"  [{', '.join(_signed(end, digits, good) for end in ends)}]"
        axes.text(1.02, place, text, color=INK, **beside)
    axes.axvline(0, color=MUTED, linewidth=1.0)
    axes.set_yticks(places, labels, fontsize=9)
    axes.set_ylim(-0.6, len(labels) - 0.4)


def _signed(value: float, digits: int, good: int) -> str:
    """Changes with their sign, gains with a minus alone."""
    text = f"{value + 0.0:{'+' if good < 0 else ''}.{digits}f}"
    return text.replace("-", "−")
