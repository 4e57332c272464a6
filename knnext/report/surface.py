"""Validation perplexity over temperature and lmbda, as inline SVG that follows the page's colours.

The colours are ten bands of log perplexity between the best point and the base model, like a
filled contour map; what is worse than the base has a colour of its own. `plots.plot_surface` draws
the same in the same colours.
"""

from __future__ import annotations

import bisect
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_BANDS = 10
_LEFT, _TOP, _WIDTH, _HEIGHT, _RIGHT = 64, 18, 560, 320, 30
_MAX_CELLS = 64  # a side; finer grids are thinned, which no eye sees at this size


@dataclass(frozen=True)
class Surface:
    """Perplexity of the mixture on a grid.

    Attributes:
        temperatures: T ascending values.
        lmbdas: L ascending values.
        perplexity: T lists of L values.
        best: (temperature, lmbda, perplexity) of the lowest point.
        base: perplexity of the base model on the same text.
        name: of the system whose grid it is.
    """

    temperatures: Sequence[float]
    lmbdas: Sequence[float]
    perplexity: Sequence[Sequence[float]]
    best: tuple[float, float, float]
    base: float
    name: str = ""


def surface_figure(surface: Surface) -> str:
    """A figure element with a caption that says all the picture does."""
    columns = _thinned(len(surface.temperatures))
    rows = _thinned(len(surface.lmbdas))
    cells = _cells(surface, columns, rows)
    x = _LEFT + _place(surface.temperatures, columns, surface.best[0]) * _WIDTH
    y = _TOP + (1 - _place(surface.lmbdas, rows, surface.best[1])) * _HEIGHT
    best = f"temperature {surface.best[0]:.3g}, λ {surface.best[1]:.3g}"
    words = (
        f"{surface.name + ': ' if surface.name else ''}perplexity {surface.best[2]:,.1f} at "
        f"{best}; the base model alone has {surface.base:,.1f} on the same text."
    )
    return "\n".join(
        [
            "<figure>",
            f'<svg viewBox="0 0 {_LEFT + _WIDTH + _RIGHT} {_TOP + _HEIGHT + 108}" role="img" '
            f'aria-label="{html.escape(words)}">',
            *cells,
            *_axis(surface.temperatures, columns, horizontal=True),
            *_axis(surface.lmbdas, rows, horizontal=False),
            f'<circle class="halo" cx="{x:.1f}" cy="{y:.1f}" r="7"/>',
            f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="7"/>',
            *_legend(surface, any('class="over"' in cell for cell in cells)),
            "</svg>",
            f"<figcaption>{html.escape(words)} The ring marks the point used for the test split; "
            "the further a colour is from the page's, the lower the perplexity.</figcaption>",
            "</figure>",
        ]
    )


def _thinned(count: int) -> list[int]:
    """At most `_MAX_CELLS` indices, evenly spread, both ends kept."""
    if count <= _MAX_CELLS:
        return list(range(count))
    return [round(i * (count - 1) / (_MAX_CELLS - 1)) for i in range(_MAX_CELLS)]


def _cells(surface: Surface, columns: list[int], rows: list[int]) -> list[str]:
    """One rectangle for each run of equal bands along a row."""
    width, height = _WIDTH / len(columns), _HEIGHT / len(rows)
    cells = []
    for r, row in enumerate(rows):
        bands = [_band(surface.perplexity[c][row], surface) for c in columns]
        start = 0
        for c in range(1, len(bands) + 1):
            if c < len(bands) and bands[c] == bands[start]:
                continue
            # Half a unit more on each side: neighbors must not leave a hairline between them.
            cells.append(
                f'<rect class="{bands[start]}" x="{_LEFT + start * width:.1f}" '
                f'y="{_TOP + _HEIGHT - (r + 1) * height:.1f}" '
                f'width="{(c - start) * width + 0.5:.1f}" height="{height + 0.5:.1f}"/>'
            )
            start = c
    return cells


def _band(perplexity: float, surface: Surface) -> str:
    if not perplexity <= surface.base * (1 + 1e-9):  # lmbda 0 is the base itself
        return "over"
    span = math.log(surface.base / surface.best[2])
    share = math.log(perplexity / surface.best[2]) / span if span > 0 else 0.0
    return f"s{min(_BANDS - 1, max(0, int(share * _BANDS)))}"


def _place(values: Sequence[float], chosen: list[int], at: float) -> float:
    """Where a value lies along an axis, from 0 to 1; cells are of one width whatever they hold."""
    shown = [values[i] for i in chosen]
    right = min(max(bisect.bisect_left(shown, at), 1), len(shown) - 1) if len(shown) > 1 else 0
    left = max(right - 1, 0)
    gap = shown[right] - shown[left]
    share = (at - shown[left]) / gap if gap else 0.0
    return (left + 0.5 + min(1.0, max(0.0, share))) / len(shown)


def _axis(values: Sequence[float], chosen: list[int], *, horizontal: bool) -> list[str]:
    x: float
    y: float
    lines = []
    for tick in ticks(values[0], values[-1]):
        along = _place(values, chosen, tick)
        if horizontal:
            x, y, anchor = _LEFT + along * _WIDTH, _TOP + _HEIGHT + 17, "middle"
        else:
            x, y, anchor = _LEFT - 8, _TOP + (1 - along) * _HEIGHT + 4, "end"
        lines.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{tick:,.12g}</text>')
    if horizontal:
        x, y = _LEFT + _WIDTH / 2, _TOP + _HEIGHT + 42
        lines.append(f'<text class="label" x="{x}" y="{y}" text-anchor="middle">temperature</text>')
    else:
        lines.append(f'<text class="label" x="6" y="{_TOP + _HEIGHT / 2}">λ</text>')
    return lines


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high: powers of ten over a wide range, even steps else."""
    if low > 0 and high > 50 * low:
        powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        return [10.0**power for power in powers]
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(step * part for part in (0.2, 0.5, 1, 2) if (high - low) / (step * part) <= 8)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _legend(surface: Surface, over: bool) -> list[str]:
    """The bands that occur: where no mixture beats the base there are none below it."""
    y, width = _TOP + _HEIGHT + 62, 36
    ratio = surface.base / surface.best[2]
    bands = _BANDS if ratio > 1 else 0
    lines = [
        f'<rect class="s{i}" x="{_LEFT + i * width}" y="{y}" width="{width + 0.5}" height="12"/>'
        for i in range(bands)
    ]
    for i in (0, 5, 10) if bands else ():
        value = surface.best[2] * ratio ** (i / _BANDS)
        text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        anchor = ("start", "middle", "end")[i // 5]
        lines.append(
            f'<text x="{_LEFT + i * width}" y="{y + 30}" text-anchor="{anchor}">{text}</text>'
        )
    if over:
        x = _LEFT + bands * width + (20 if bands else 0)
        lines.append(f'<rect class="over" x="{x}" y="{y}" width="{width}" height="12"/>')
        lines.append(f'<text x="{x}" y="{y + 30}">worse than the base</text>')
    return lines
