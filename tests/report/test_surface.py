"""One language of colours: in the page's surface, in tuning.png, in the style sheet."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from knnext.report.colors import CARD, GRID, INK, MUTED, OVER, SHADES
from knnext.report.surface import Surface, surface_figure


def surface(perplexity: list[list[float]], base: float) -> Surface:
    best = min(min(row) for row in perplexity)
    lmbdas = [i / len(perplexity[0]) for i in range(len(perplexity[0]))]
    return Surface(range(1, len(perplexity) + 1), lmbdas, perplexity, (1, 0, best), base)


def test_the_style_sheet_has_the_pictures_colours() -> None:
    style = files("knnext.report").joinpath("style.css").read_text(encoding="utf-8")
    light = style.partition("@media (prefers-color-scheme: dark)")[0]
    named = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    assert [named[f"s{i}"] for i in range(10)] == list(SHADES)
    found = (named["over"], named["ink"], named["muted"], named["line"], named["card"])
    assert found == (OVER, INK, MUTED, GRID, CARD)


@pytest.mark.parametrize(
    ("grid", "base", "bands", "worse"),
    [
        ([[50, 80, 100], [60, 120, 90]], 100, 10, True),
        ([[50, 80, 100], [60, 70, 90]], 100, 10, False),  # nothing is worse: no such colour
        ([[100, 110], [100, 130]], 100, 0, True),  # nothing beats the base
        ([[100, math.inf], [100, 130]], 100, 0, True),
    ],
)
def test_the_surface_names_no_colour_that_it_has_not(
    grid: list[list[float]], base: float, bands: int, worse: bool
) -> None:
    drawn = surface_figure(surface(grid, base))
    legend = drawn.rpartition('class="best"')[2]
    assert len(re.findall(r'class="s\d"', legend)) == bands
    assert ("worse than the base" in legend) == ('class="over"' in legend) == worse
    assert "nan" not in drawn


def result(grid: list[list[float]], base: float) -> Any:
    from types import SimpleNamespace

    array = np.array(grid, dtype=float)
    at = np.unravel_index(array.argmin(), array.shape)
    return SimpleNamespace(
        surface=np.log(array), temperatures=np.arange(1.0, len(grid) + 1),
        lmbdas=np.linspace(0, 0.9, array.shape[1]), temperature=float(at[0] + 1),
        lmbda=float(np.linspace(0, 0.9, array.shape[1])[at[1]]), perplexity=float(array.min()),
        base_perplexity=base, base_nll=math.log(base),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "colors"),
    [
        ([[100, 60, 150], [100, 50, 90]], [*SHADES, OVER]),
        ([[100, 60, 80], [100, 50, 90]], [*SHADES]),
        ([[100, 110], [100, 130]], [SHADES[-1], OVER]),
        ([[100, math.inf], [100, 130]], [SHADES[-1], OVER]),
    ],
)
def test_the_picture_has_the_surfaces_bands(grid: list[list[float]], colors: list[str]) -> None:
    pytest.importorskip("matplotlib")
    from knnext.report.plots import _bands, plot_surface

    found = result(grid, 100.0)
    levels, named = _bands(found)
    assert named == colors and len(levels) == len(colors) + 1
    assert levels[0] == pytest.approx(min(map(min, grid))) and all(np.diff(levels) > 0)
    figure = plot_surface(found)
    words = [text.get_text() for axes in figure.axes for text in axes.findobj(_text())]
    assert any("λ" in text for text in words) and not any("lmbda" in text for text in words)
    assert any("worse than" in text for text in words) == (OVER in colors)
    assert "the LM alone: 100" in figure.axes[0].get_title(loc="left")
    figure.canvas.draw()
    said = [t for axes in figure.axes for t in axes.findobj(_text()) if t.get_text().strip()]
    for one, other in combinations([t for t in said if t.get_visible() and inside(t)], 2):
        a, b = (text.get_window_extent().padded(-1) for text in (one, other))
        assert not a.overlaps(b), (one.get_text(), other.get_text())


def inside(text: Any) -> bool:
    """What lies beyond an axis, such as the tick after its last, is not drawn."""
    x, y = text.get_window_extent().get_points().mean(axis=0)
    return bool(text.figure.bbox.padded(2).contains(x, y))


def _text() -> Any:
    from matplotlib.text import Text

    return Text
