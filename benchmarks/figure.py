"""The README's figure, perplexity and speed, out of results that are in the repository.

    python -m benchmarks.figure

Left: what `knnext experiment approximation` found (docs/results). Right: what `make bench` measured
(benchmarks/results), as ratios within one run. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report.rows import Row, Source, read
from knnext.experiments.lab.figures import COLORS, INK, MARKERS, MUTED, dress, legend_below, look
from knnext.report.plots import save_figure

ROOT = Path(__file__).resolve().parents[1]
QUALITY = ROOT / "docs" / "results" / "small-stdlib" / "approximation.json"
SPEED = ROOT / "benchmarks" / "results" / "cpu-2026-11-29.json"
PICTURE = ROOT / "docs" / "images" / "perplexity-and-speed.png"

#: The search of the experiment that stands for FAISS: the paper's, scaled to this datastore.
FAISS = {"search": "FAISS", "nprobe": 32, "code": "PQ16"}
#: Ops and their rivals; of several the fastest counts. Bare products are limits and no rivals.
RIVALS = (
    ("knn_search", ("faiss_flat",), "search: FAISS IndexFlatL2"),
    ("knn_search", ("torch_chunked",), "search: PyTorch, product and topk"),
    ("knn_softmax", ("torch_eager", "torch_compiled"), "softmax: PyTorch's fastest"),
    (
        "knn_interpolate",
        ("torch_eager", "torch_probabilities", "torch_compiled"),
        "interpolate: PyTorch's fastest",
    ),
    (
        "knn_target_log_prob",
        ("torch_whole_row", "torch_masked", "compiled_masked"),
        "target's probability: PyTorch's fastest",
    ),
)
QUERIES = (1, 1024)


class Change(NamedTuple):
    """Of test perplexity against the base LM, in percent, with its 95 % interval.

    ``way``: the (mask, score) that the figures' looks go by.
    """

    words: str
    way: tuple[str, str]
    perplexity: float
    value: float
    low: float
    high: float


def changes(result: dict[str, Any]) -> list[Change]:
    """Of the whole datastore: exact search, and FAISS's neighbors by both scores."""
    whole = [row for row in result["rows"] if row["fraction"] == 1.0]
    wanted = (
        ("exact search", {"search": "exact"}),
        ("FAISS's neighbors,\nreal distances", {**FAISS, "score": "real"}),
        ("FAISS's neighbors\nand distances", {**FAISS, "score": "faiss"}),
    )
    found = []
    for words, facts in wanted:
        (row,) = (r for r in whole if all(r[name] == fact for name, fact in facts.items()))
        number = r"([-+][\d.]+)"
        parts = re.fullmatch(rf"{number} % \[{number}, {number}\]", row["change"])
        if parts is None:
            raise ValueError(f"{words}: no change with an interval in {row['change']!r}")
        way = ("exact" if facts["search"] == "exact" else "faiss", row["score"])
        found.append(Change(words, way, row["perplexity"], *map(float, parts.groups())))
    return found


def ratio(rows: list[Row], op: str, rivals: Sequence[str], queries: int) -> float | None:
    """The fastest rival's seconds over knnext's, at the first shape with so many queries."""
    ours = [r for r in rows if r.op == op and r.implementation == "knnext" and r["Q"] == queries]
    ours = [r for r in ours if op != "knn_search" or (r["D"], r["dtype"]) == (1024, "float16")]
    if not ours:
        return None
    theirs = [r for r in rows if r.group == ours[0].group and r.implementation in rivals]
    return min(r.seconds for r in theirs) / ours[0].seconds if theirs else None


def draw(result: dict[str, Any], source: Source, rows: list[Row]) -> Any:
    """The matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.2, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_changes(left, changes(result))
    _draw_ratios(right, source, rows)
    return figure


def _draw_changes(axes: Any, found: list[Change]) -> None:
    places = list(range(len(found)))[::-1]
    for place, change in zip(places, found, strict=True):
        style = look(*change.way)
        axes.plot([change.low, change.high], [place, place], color=style["color"], linewidth=2)
        axes.plot(change.value, place, markersize=8, **style)
        text = f"{change.value:+.1f} %".replace("-", "−")
        axes.annotate(text, (change.value, place), (0, 9), textcoords="offset points", ha="center")
    axes.set_yticks(places, [change.words for change in found])
    axes.set_ylim(-0.6, len(found) - 0.3)
    axes.set_xlim(min(change.low for change in found) - 4, 0)
    axes.set_xticks([-40, -20, 0])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} %".replace("-", "−"))
    dress(
        axes,
        title="Perplexity against the LM alone,\na small GPT-2 trained here",
        xlabel="change on test, 95 % interval",
        ylabel="",
    )
    axes.tick_params(axis="y", colors=INK)


def _draw_ratios(axes: Any, source: Source, rows: list[Row]) -> None:
    places = list(range(len(RIVALS)))[::-1]
    for number, queries in enumerate(QUERIES):
        shown = [ratio(rows, op, rivals, queries) for op, rivals, _ in RIVALS]
        label = "1 query" if queries == 1 else f"{queries:,} queries"
        for place, value in zip(places, shown, strict=True):
            if value is None:
                continue
            above = 0.14 if number == 0 else -0.14
            axes.plot(value, place + above, MARKERS[number], color=COLORS[number], label=label)
            axes.annotate(
                f"{value:.1f}",
                (value, place + above),
                (7, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=INK,
            )
            label = None  # said once
    axes.axvline(1.0, color=MUTED, linewidth=1.0, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlim(0.7, 22)
    axes.set_xticks([1, 2, 5, 10, 20])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_yticks(places, [words for _, _, words in RIVALS])
    axes.set_ylim(-0.5, len(RIVALS) - 0.5)
    threads = source.machine.get("threads", "?")
    title = f"How many times as fast as its rivals,\n{threads} CPU threads"
    dress(axes, title=title, xlabel="", ylabel="", legend=False)
    axes.tick_params(axis="y", colors=INK)
    legend_below(axes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figure", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--quality", type=Path, default=QUALITY, help="approximation.json")
    parser.add_argument("--speed", type=Path, default=SPEED, help="JSON of benchmarks")
    parser.add_argument("--out", type=Path, default=PICTURE)
    given = parser.parse_args(arguments)
    try:
        result = json.loads(given.quality.read_text(encoding="utf-8"))
        save_figure(draw(result, *read(given.speed)), given.out)
    except (ImportError, OSError, KeyError, ValueError) as error:
        parser.exit(2, f"figure: {error}\n")
    print(given.out)


if __name__ == "__main__":
    main()
