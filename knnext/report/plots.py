"""Pictures of results, in the pages' colours. matplotlib is loaded when one is made, and its global
state is not used."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from knnext.errors import missing_package
from knnext.evaluation.tune import TuneResult
from knnext.output import whole_file
from knnext.report.colors import INK, MUTED, OVER, SHADES

_DPI = 150


def plot_surface(
    result: TuneResult, path: str | Path | None = None, *, title: str | None = None
) -> Any:
    """Contours of perplexity over temperature and lmbda, the optimum marked.

    Args:
        result: from `tune`, with at least two temperatures and two weights.
        path: where to save; the ending chooses the format (`.png`, `.svg`, `.pdf`).
        title: over the picture; by default the best perplexity and the LM's own.

    Returns:
        The matplotlib `Figure`.
    """
    if min(result.surface.shape) < 2:
        raise ValueError(
            f"a surface needs two temperatures and two lmbdas, got {result.surface.shape}"
        )
    figure, axes = _new_figure()
    levels, colors = _bands(result)
    perplexity = np.exp(result.surface).clip(levels[0], levels[-1])
    grid = (result.temperatures, result.lmbdas, perplexity.T)
    filled = axes.contourf(*grid, levels=levels, colors=colors)
    # The ring of the report's surface.
    place = (result.temperature, result.lmbda)
    axes.plot(*place, "o", ms=11, mfc="none", mec="#10181f", mew=4.5)
    axes.plot(*place, "o", ms=11, mfc="none", mec="white", mew=2.0)
    _annotate(axes, result)
    _dress(axes, result, title)
    bar = figure.colorbar(filled, ax=axes, pad=0.02, format=lambda value, _: _label(value))
    bar.set_label("perplexity per token", color=MUTED)
    # The last band runs from the base's perplexity to the worst there is: it needs a word, no end.
    bar.set_ticks(levels[: len(SHADES) + 1 : 5] if len(colors) > 2 else levels[:1])
    bar.ax.tick_params(colors=MUTED)
    if colors[-1] == OVER:
        high = float(np.mean(levels[-2:]))
        bar.ax.text(1.4, high, "worse than\nthe base", va="bottom", fontsize=8, color=MUTED)
    bar.outline.set_visible(False)
    if path is not None:
        save_figure(figure, Path(path))
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture; it appears under its name when whole."""
    kind = path.suffix[1:].lower() or "png"
    with whole_file(path) as part:
        if kind == "png":
            _save_small(figure, part)
        else:
            figure.savefig(part, format=kind, dpi=_DPI, facecolor="white")


def _save_small(figure: Any, part: Any) -> None:
    """As PNG of 256 colours, a third of the size: lines and plain fills need no more."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI, facecolor="white")
    with Image.open(drawn) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(part, format="png", optimize=True)


def _new_figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_package("plots need", "matplotlib", "lm") from None
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    return figure, figure.add_subplot()


def _bands(result: TuneResult) -> tuple[Any, list[str]]:
    """Levels and the colour between each two: as the report's surface has them.

    Ten bands of log perplexity from the best point to the base, and one for all that is worse. Near
    lmbda = 1 the surface runs to infinity: contours up there would hide the valley.
    """
    finite = result.surface[np.isfinite(result.surface)]
    low, base = float(finite.min()), result.base_nll
    # lmbda 0 is the base itself, and no worse than it.
    worse = bool((result.surface > base + 1e-9).any())
    if base - low < 1e-6:  # nothing beats the base
        return np.exp([low, low + 1e-3, low + 2e-3]), [SHADES[-1], OVER]
    levels = np.exp(np.linspace(low, base, len(SHADES) + 1))
    levels[-1] *= 1 + 1e-9
    if not worse:
        return levels, list(SHADES)
    step = levels[-1] - levels[-2]
    return np.append(levels, levels[-1] + step), [*SHADES, OVER]


def _annotate(axes: Any, result: TuneResult) -> None:
    text = (
        f"{_label(result.perplexity)} at temperature {result.temperature:.3g}, λ {result.lmbda:.3g}"
    )
    # Kept inside the picture: the label goes to the side with more room.
    left = _share_along(result) > 0.5
    axes.annotate(
        text,
        (result.temperature, result.lmbda),
        xytext=(-10 if left else 10, 12),
        textcoords="offset points",
        ha="right" if left else "left",
        fontsize=9,
        color=INK,
        bbox={"boxstyle": "round,pad=0.3", "fc": "white", "ec": "none", "alpha": 0.85},
    )


def _share_along(result: TuneResult) -> float:
    """How far along the temperature axis the optimum lies, from 0 to 1."""
    values = np.array([result.temperatures[0], result.temperature, result.temperatures[-1]])
    first, here, last = np.log(values) if _is_log(result) else values
    return float((here - first) / (last - first))


def _dress(axes: Any, result: TuneResult, title: str | None) -> None:
    if _is_log(result):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    axes.set_xlabel("temperature", color=MUTED)
    axes.set_ylabel("λ, weight of $p_{kNN}$", color=MUTED)
    axes.set_title(
        title
        or f"The mixture: perplexity {_label(result.perplexity)} at best; "
        f"the LM alone: {_label(result.base_perplexity)}",
        loc="left",
        fontsize=11,
        color=INK,
    )
    axes.tick_params(colors=MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _is_log(result: TuneResult) -> bool:
    """Whether the temperatures span so much that only a log axis shows them."""
    return bool(result.temperatures[-1] > 50 * result.temperatures[0])


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
