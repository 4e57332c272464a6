"""The figure of the padding experiment: curves, advantages, depth, and the cost by geometry."""

from __future__ import annotations

from typing import Any

from knnext.experiments.lab.figures import (
    COLORS,
    INK,
    MUTED,
    dress,
    legend_below,
    line,
    percent_change,
    reference_line,
    searched,
)

_WIDTH, _HEIGHT = 12.0, 11.0
#: Places on the axis of k / N that are nearer to one another, as a factor, share a label.
_ONE_LABEL = 1.8


def plot(result: dict[str, Any], axes: Any) -> None:
    """Four panels in the place of `axes`, from the JSON alone."""
    figure = axes.figure
    axes.remove()
    figure.set_size_inches(_WIDTH, _HEIGHT)
    panels = figure.subplots(2, 2)
    series = result["series"]
    smallest = min(c["fraction"] for c in series["curves"])
    _curves(panels[0, 0], [c for c in series["curves"] if c["fraction"] == smallest], smallest)
    _advantages(panels[0, 1], series["contrasts"])
    _depths(panels[1, 0], series["depths"])
    _origins(panels[1, 1], series["origins"])


def _curves(axes: Any, curves: list[dict[str, Any]], fraction: float) -> None:
    """Perplexity by temperature; zero rows dashed."""
    numbers = {("exact", "real"): 0, ("faiss", "faiss"): 1, ("faiss", "real"): 2}
    for curve in curves:
        way = (curve["mask"], curve["score"])
        # What lies on one another stays visible: broad and pale below, thin above.
        broad = {"alpha": 0.35, "linewidth": 5.0} if curve["mask"] == "exact" else {}
        style = {"linestyle": "--", "fillstyle": "none"} if curve["padding"] else broad
        label = searched(*way) + (", zero rows" if curve["padding"] else "")
        line(axes, curve["temperatures"], curve["perplexity"], label, numbers[way], **style)
    reference_line(axes, curves[0]["base"], "LM alone")
    axes.set_xscale("log")
    dress(
        axes,
        title=f"{100 * fraction:.3g} % of the datastore",
        xlabel="temperature t (λ fitted on valid for each)",
        ylabel="perplexity on test",
        legend=False,
    )
    legend_below(axes, 1)


def _advantages(axes: Any, contrasts: list[dict[str, Any]]) -> None:
    """FAISS instead of exact search: change of perplexity, with and without zero rows."""
    labels = []
    for place, c in enumerate(reversed(contrasts)):
        score = "real distances" if c["score"] == "real" else "FAISS's distances"
        labels.append(f"{100 * c['fraction']:.3g} %, {c['nprobe']} lists, {score}")
        for shift, number, name in ((0.17, 1, "with_rows"), (-0.17, 0, "without")):
            gain = c[name]
            y = place + shift
            axes.plot(
                [percent_change(gain["value"])],
                [y],
                "os"[number],
                color=COLORS[number],
                markersize=5,
            )
            if gain["low"] is not None:
                ends = [percent_change(gain["low"]), percent_change(gain["high"])]
                axes.plot(ends, [y, y], color=COLORS[number], linewidth=1.6)
    axes.plot([], [], "s-", color=COLORS[1], label="with zero rows")
    axes.plot([], [], "o-", color=COLORS[0], label="without")
    axes.axvline(0, color=MUTED, linewidth=1.0)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    dress(
        axes,
        title="FAISS instead of exact search",
        xlabel="change of perplexity, % (left of 0: FAISS is better)",
        ylabel="",
        legend=False,
    )
    legend_below(axes)


def _depths(axes: Any, depths: dict[str, Any]) -> None:
    """Share of places taken by k / N, for keys as they are and moved."""
    moved = 0
    for curve in depths["curves"]:
        label = f"{curve['h_ds']}, mean share {curve['mean_share']:.2f}"
        style: dict[str, Any] = {"linewidth": 2.2, "color": COLORS[curve["h_ds"] == "ffn"]}
        if curve["moved"]:
            moved += 1
            style = {"linewidth": 1.1, "color": MUTED, "linestyle": (0, (moved, 1.2))}
            label = f"moved to {curve['mean_share']:.2g}"
        axes.plot(depths["kept"], [100 * p for p in curve["places"]], label=label, **style)
    marks = [(kept, f"ours,\n{100 * float(n):.3g} %", 2) for n, kept in depths["ours"].items()]
    marks += [(kept, f"paper,\n{name}", 4) for name, kept in depths["paper"].items()]
    above: list[tuple[float, str]] = []
    for kept, text, color in sorted(marks):
        axes.axvline(kept, color=COLORS[color], linewidth=1.0)
        if above and kept < _ONE_LABEL * above[-1][0]:
            kept, other = above.pop()
            text = f"{other}\n{text}"
        above.append((kept, text))
    for kept, text in above:
        _above(axes, kept, text)
    lines = max((text.count("\n") + 1 for _, text in above), default=0)
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    dress(
        axes,
        title="Where zero rows get into the exact top k" + "\n" * lines,
        xlabel="k / N: share of the real rows that is kept",
        ylabel="places taken by zero rows, %",
        legend=False,
    )
    legend_below(axes, 3)


def _above(axes: Any, x: float, text: str) -> None:
    """A word at the upper edge, outside the curves' room."""
    place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
    axes.annotate(text, (x, 1.01), fontsize=7, color=MUTED, **place)


def _origins(axes: Any, origins: list[dict[str, Any]]) -> None:
    """What zero rows cost exact search by where the origin lies."""
    fractions = sorted({o["fraction"] for o in origins})
    for number, fraction in enumerate(fractions):
        points = sorted(
            (o for o in origins if o["fraction"] == fraction), key=lambda o: o["mean_share"]
        )
        x = [o["mean_share"] for o in points]
        y = [percent_change(o["gain"]["value"]) for o in points]
        color = COLORS[number]
        axes.plot(x, y, "o-", color=color, label=f"{100 * fraction:.3g} % of the datastore")
        if points[0]["gain"]["low"] is not None:
            ends = [[percent_change(o["gain"][e]) for o in points] for e in ("low", "high")]
            axes.fill_between(x, *ends, color=color, alpha=0.15, linewidth=0)
        asis = next(o for o in points if not o["moved"])
        axes.plot([asis["mean_share"]], [percent_change(asis["gain"]["value"])], "*", color=INK)
    axes.plot([], [], "*", color=INK, linestyle="none", label="our keys as they are")
    axes.axhline(0, color=MUTED, linewidth=1.0)
    dress(
        axes,
        title="What zero rows do to exact search, by geometry",
        xlabel="|mean key|$^2$ / mean |key|$^2$",
        ylabel="change of perplexity, %",
        legend=False,
    )
    legend_below(axes, 3)
