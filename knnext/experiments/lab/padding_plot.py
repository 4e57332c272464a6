"""The figure of the padding experiment: curves, advantages, depth, and the cost by geometry."""

from __future__ import annotations

from typing import Any

from knnext.experiments.lab.figures import (
    INK,
    MUTED,
    STATES,
    STATES_NOTE,
    dress,
    legend_below,
    line,
    look,
    note,
    percent_change,
    plain_ticks,
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
    note(
        figure,
        f"{STATES_NOTE} Share of the mean: squared length of the mean key, of the mean squared "
        "length of keys; 0 where the keys lie around the origin, as zero rows do.",
    )


#: With zero rows dashed and hollow, without them solid, in the colour of the way of searching.
_ROWS = {"with_rows": {"linestyle": "--"}, "without": {"linestyle": "-"}}


def _curves(axes: Any, curves: list[dict[str, Any]], fraction: float) -> None:
    """Perplexity by temperature; zero rows dashed."""
    for curve in curves:
        way = (curve["mask"], curve["score"])
        # What lies on one another stays visible: broad and pale below, thin above.
        broad = {"alpha": 0.35, "linewidth": 5.0} if curve["mask"] == "exact" else {}
        style = {"linestyle": "--", "fillstyle": "none"} if curve["padding"] else broad
        label = "_" if curve["padding"] else searched(*way)
        style = {**look(*way), "markersize": 4, **style}
        line(axes, curve["temperatures"], curve["perplexity"], label, **style)
    _legend_of_rows(axes)
    reference_line(axes, curves[0]["base"], "the LM alone")
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    dress(
        axes,
        title=f"Perplexity by temperature, {100 * fraction:.3g} % of the datastore",
        xlabel="temperature t, log scale (λ fitted at each)",
        ylabel="perplexity per token (test)",
        legend=False,
    )
    legend_below(axes, 2)


def _advantages(axes: Any, contrasts: list[dict[str, Any]]) -> None:
    """FAISS instead of exact search: change of perplexity, with and without zero rows."""
    labels = []
    for place, c in enumerate(reversed(contrasts)):
        score = "real distances" if c["score"] == "real" else "FAISS's distances"
        labels.append(f"{100 * c['fraction']:.3g} %, {c['nprobe']} lists, {score}")
        style = look("faiss", c["score"])
        for y, name in ((place + 0.17, "with_rows"), (place - 0.17, "without")):
            gain = c[name]
            if gain["low"] is not None:
                ends = [percent_change(gain["low"]), percent_change(gain["high"])]
                axes.plot(ends, [y, y], linewidth=1.6, **_ROWS[name], color=style["color"])
            fill = "white" if name == "with_rows" else style["color"]
            change = [percent_change(gain["value"])]
            axes.plot(change, [y], markersize=5, **style, markerfacecolor=fill)
    _legend_of_rows(axes)
    axes.axvline(0, color=MUTED, linewidth=1.0)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    dress(
        axes,
        title="FAISS instead of exact search",
        xlabel="change of perplexity (test), % (left of 0: FAISS is better)",
        ylabel="",
        legend=False,
    )
    legend_below(axes)


def _legend_of_rows(axes: Any) -> None:
    for name, label in (("with_rows", "with zero rows"), ("without", "without them")):
        mark = {"marker": "o", "markerfacecolor": "white" if name == "with_rows" else INK}
        axes.plot([], [], color=INK, label=label, markersize=5, **mark, **_ROWS[name])


def _depths(axes: Any, depths: dict[str, Any]) -> None:
    """Share of places taken by k / N, for keys as they are and moved."""
    moved = 0
    for curve in depths["curves"]:
        label = f"{curve['h_ds']} as it is, share of the mean {curve['mean_share']:.2f}"
        style: dict[str, Any] = {"linewidth": 2.2, "color": STATES[curve["h_ds"]]}
        if curve["moved"]:
            moved += 1
            style = {"linewidth": 1.1, "color": MUTED, "linestyle": (0, (moved, 1.2))}
            label = f"att moved to {curve['mean_share']:.2g}"
        axes.plot(depths["kept"], [100 * p for p in curve["places"]], label=label, **style)
    marks = [(kept, f"ours,\n{100 * float(n):.3g} %", "-") for n, kept in depths["ours"].items()]
    marks += [(kept, f"paper,\n{name}", ":") for name, kept in depths["paper"].items()]
    above: list[tuple[float, str]] = []
    for kept, text, stroke in sorted(marks):
        axes.axvline(kept, color=INK, linewidth=1.0, linestyle=stroke)
        if above and kept < _ONE_LABEL * above[-1][0]:
            kept, other = above.pop()
            text = f"{other}\n{text}"
        above.append((kept, text))
    for kept, text in above:
        _above(axes, kept, text)
    lines = max((text.count("\n") + 1 for _, text in above), default=0)
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_formatter(lambda value, _: f"1 / {_short(1 / value)}")
    dress(
        axes,
        title="",
        xlabel="k / N: share of the rows that are neighbors, log scale",
        ylabel="places taken by zero rows, %",
        legend=False,
    )
    legend_below(axes, 2)
    title = {"loc": "left", "fontsize": 11, "color": INK}
    axes.set_title("Where zero rows get into the exact top k", pad=8 + 9 * lines, **title)


def _short(count: float) -> str:
    """`100`, `10k`, `1M`."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= size * (1 - 1e-9):
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def _above(axes: Any, x: float, text: str) -> None:
    """A word at the upper edge, outside the curves' room."""
    place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
    axes.annotate(text, (x, 1.01), fontsize=7, color=MUTED, **place)


_STAR: dict[str, Any] = {"marker": "*", "color": INK, "markersize": 11, "linestyle": "none"}


def _origins(axes: Any, origins: list[dict[str, Any]]) -> None:
    """What zero rows cost exact search by where the origin lies."""
    fractions = sorted({o["fraction"] for o in origins})
    for number, fraction in enumerate(fractions):
        points = sorted(
            (o for o in origins if o["fraction"] == fraction), key=lambda o: o["mean_share"]
        )
        x = [o["mean_share"] for o in points]
        y = [percent_change(o["gain"]["value"]) for o in points]
        color = look("exact", "real")["color"]
        style = {"marker": "o", "linestyle": ":"} if number == 0 else {"marker": "o"}
        fill = "white" if number == 0 else color
        label = f"{100 * fraction:.3g} % of the datastore"
        axes.plot(x, y, color=color, label=label, markerfacecolor=fill, **style)
        if points[0]["gain"]["low"] is not None:
            ends = [[percent_change(o["gain"][e]) for o in points] for e in ("low", "high")]
            axes.fill_between(x, *ends, color=color, alpha=0.15, linewidth=0)
        asis = next(o for o in points if not o["moved"])
        axes.plot([asis["mean_share"]], [percent_change(asis["gain"]["value"])], **_STAR)
    axes.plot([], [], **_STAR, label="our keys as they are")
    axes.axhline(0, color=MUTED, linewidth=1.0)
    dress(
        axes,
        title="What zero rows cost exact search",
        xlabel="share of the mean in the keys (0: they lie around the origin)",
        ylabel="change of perplexity (test), %",
        legend=False,
    )
    legend_below(axes, 3)
