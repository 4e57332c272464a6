"""The figure of the padding experiment: curves, advantages, depth, and the cost by geometry."""

from __future__ import annotations

from typing import Any

from knnext.experiments.lab.figures import (
    COLORS,
    INK,
    MUTED,
    dress,
    line,
    percent_change,
    reference_line,
)

_WIDTH, _HEIGHT = 11.0, 8.6


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


def _name(mask: str, score: str) -> str:
    if mask == "exact":
        return "exact"
    return "FAISS" if score == "faiss" else "FAISS, real score"


def _curves(axes: Any, curves: list[dict[str, Any]], fraction: float) -> None:
    """Perplexity by temperature; zero rows dashed."""
    numbers = {"exact": 0, "FAISS": 1, "FAISS, real score": 2}
    for curve in curves:
        name = _name(curve["mask"], curve["score"])
        style = {"linestyle": "--", "fillstyle": "none"} if curve["padding"] else {}
        label = f"{name}, zero rows" if curve["padding"] else name
        line(axes, curve["temperatures"], curve["perplexity"], label, numbers[name], **style)
    reference_line(axes, curves[0]["base"], "LM alone")
    axes.set_xscale("log")
    dress(
        axes,
        title=f"{100 * fraction:.3g} % of the datastore",
        xlabel="temperature t (lmbda fitted on valid for each)",
        ylabel="perplexity on test",
    )


def _advantages(axes: Any, contrasts: list[dict[str, Any]]) -> None:
    """FAISS instead of exact search: change of perplexity, with and without zero rows."""
    labels = []
    for place, c in enumerate(reversed(contrasts)):
        score = "real score" if c["score"] == "real" else "FAISS score"
        labels.append(f"{100 * c['fraction']:.3g} %, nprobe {c['nprobe']}, {score}")
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
    )


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
    for name, kept in depths["ours"].items():
        axes.axvline(kept, color=COLORS[2], linewidth=1.0)
        axes.text(kept, 101, f"ours, {100 * float(name):.3g} %", fontsize=7, ha="center")
    for name, kept in depths["paper"].items():
        axes.axvline(kept, color=COLORS[4], linewidth=1.0)
        axes.text(kept, 101, f"paper, {name}", fontsize=7, ha="center")
    axes.set_xscale("log")
    axes.set_ylim(0, 108)
    dress(
        axes,
        title="Where zero rows get into the exact top k",
        xlabel="k / N: share of the real rows that is kept",
        ylabel="places taken by zero rows, %",
    )


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
    )
