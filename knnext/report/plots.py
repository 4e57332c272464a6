"""Pictures of results. matplotlib is loaded when one is made, and its global state is not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from knnext.evaluation.tune import TuneResult
from knnext.output import whole_file

_INK, _MUTED = "#1f2933", "#52606d"


def plot_surface(
    result: TuneResult, path: str | Path | None = None, *, title: str | None = None
) -> Any:
    """Contours of perplexity over temperature and lmbda, the optimum marked.

    Args:
        result: from `tune`, with at least two temperatures and two weights.
        path: where to save; the ending chooses the format (`.png`, `.svg`, `.pdf`).
        title: over the picture; by default the base and the best perplexity.

    Returns:
        The matplotlib `Figure`.
    """
    if min(result.surface.shape) < 2:
        raise ValueError(
            f"a surface needs two temperatures and two lmbdas, got {result.surface.shape}"
        )
    figure, axes = _new_figure()
    levels = _levels(result)
    perplexity = np.exp(result.surface).clip(levels[0], levels[-1])
    grid = (result.temperatures, result.lmbdas, perplexity.T)
    filled = axes.contourf(*grid, levels=levels, colors=_shades(levels.size - 1))
    lines = axes.contour(*grid, levels=levels[4:-1:4], colors=_MUTED, linewidths=0.5)
    axes.clabel(lines, fmt=_label, fontsize=8, colors=_INK)
    if levels[0] < result.base_perplexity < levels[-1]:
        # Above this line the neighbors do harm.
        axes.contour(
            *grid, levels=[result.base_perplexity], colors=_INK, linewidths=1.0, linestyles="--"
        )
    axes.plot(result.temperature, result.lmbda, "o", ms=8, mfc="#f25c54", mec="white", mew=1.5)
    _annotate(axes, result)
    _dress(axes, result, title)
    bar = figure.colorbar(filled, ax=axes, pad=0.02, format=lambda value, _: _label(value))
    bar.set_label("perplexity per token", color=_MUTED)
    bar.outline.set_visible(False)
    if path is not None:
        save_figure(figure, Path(path))
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture; it appears under its name when whole."""
    with whole_file(path) as part:
        figure.savefig(part, format=path.suffix[1:] or "png", dpi=150, facecolor="white")


def _new_figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "knnext[lm]"') from None
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    return figure, figure.add_subplot()


def _shades(count: int) -> Any:
    """Pale where perplexity is low, so that lines, labels and the mark stay readable there."""
    import matplotlib

    return matplotlib.colormaps["Blues"](np.linspace(0.02, 0.62, count))


def _levels(result: TuneResult) -> Any:
    """Levels from the best perplexity up to somewhat above the base, closer near the best.

    Near lmbda = 1 the surface runs to infinity: contours up there would hide the valley.
    """
    low = float(result.surface[np.isfinite(result.surface)].min())
    finite = result.surface[np.isfinite(result.surface)]
    high = min(float(finite.max()), result.base_nll + max(0.5 * (result.base_nll - low), 0.05))
    return np.exp(low + max(high - low, 1e-3) * np.linspace(0, 1, 25) ** 2)


def _annotate(axes: Any, result: TuneResult) -> None:
    text = (
        f"{_label(result.perplexity)} at temperature {result.temperature:.3g}, "
        f"lmbda {result.lmbda:.3g}"
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
        color=_INK,
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
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("temperature", color=_MUTED)
    axes.set_ylabel("lmbda, weight of p_knn", color=_MUTED)
    axes.set_title(
        title
        or f"base {_label(result.base_perplexity)} (dashed), best {_label(result.perplexity)}",
        loc="left",
        fontsize=11,
        color=_INK,
    )
    axes.tick_params(colors=_MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _is_log(result: TuneResult) -> bool:
    """Whether the temperatures span so much that only a log axis shows them."""
    return bool(result.temperatures[-1] > 50 * result.temperatures[0])


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
