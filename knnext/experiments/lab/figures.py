"""The look that the experiments' figures share. matplotlib is loaded when one is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from knnext.errors import missing_package
from knnext.report.colors import GRID, INK, MUTED

__all__ = [
    "COLORS",
    "GRID",
    "INK",
    "MARKERS",
    "MUTED",
    "bars",
    "dress",
    "legend_below",
    "line",
    "new_figure",
    "percent_change",
    "reference_line",
    "searched",
]

#: Told apart in colour and in grey, also by colour-blind readers; blue and orange are the pages'.
COLORS = ("#1f5fa8", "#d9710f", "#2b8a3e", "#7b2d8b", "#c99700", "#1098ad", "#862e9c", "#495057")
#: How neighbors were found and scored, by (mask, score), as every figure says it.
_SEARCHED = {
    ("exact", "real"): "true neighbors, real distances",
    ("exact", "faiss"): "true neighbors, FAISS's distances",
    ("faiss", "real"): "FAISS's neighbors, real distances",
    ("faiss", "faiss"): "FAISS's neighbors and distances",
}
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
    """One series; None leaves a gap."""
    axes.plot(
        x,
        [float("nan") if value is None else value for value in y],
        label=label,
        color=COLORS[number % len(COLORS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        **{"linewidth": 1.6, **style},
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
    number: int = 0,
) -> None:
    """Horizontal bars, first on top, with intervals as whiskers where they are known."""
    places = list(range(len(labels)))[::-1]
    shown = [0.0 if value is None else value for value in values]
    axes.barh(places, shown, color=COLORS[number % len(COLORS)], height=0.62)
    if intervals is not None:
        for place, value, (low, high) in zip(places, shown, intervals, strict=True):
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=INK, linewidth=1.4)
                axes.plot([value], [place], "|", color=INK)
    axes.set_yticks(places, labels, fontsize=9)
