"""Pictures: time against Q, N, k or V, one line for each implementation, the limit drawn in.

On a GPU the time itself; on a CPU time over knnext's at the same shape, since absolute times of
whatever processor ran it are of no use to others. Both axes are logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report.rows import Row
from benchmarks.report.tables import KEYS, baseline, count, full_name, grouped, relative
from knnext.report.colors import GRID, INK, MUTED

#: Colors that stay apart for color-blind eyes; one for each family, which its name's start tells.
_FAMILIES = {
    "knnext": "#0b7285",
    "bare": "#9aa5b1",
    "torch": "#d55e00",
    "compiled": "#d55e00",
    "faiss_ivfpq": "#cc79a7",
    "faiss_knn": "#56b4e9",
    "faiss": "#3b6fb6",
    "cuvs": "#6a9a1f",
    "svs": "#e69f00",
    "usearch": "#009e73",
    "scann": "#8c564b",
}
_HOPPER, _OTHER = "#5f3dc4", MUTED
_MARKS = "osD^vP"
_STYLES = ("-", "--", ":", "-.")
_NAMES = {
    "Q": "number of queries, Q",
    "N": "number of keys, N",
    "k": "number of neighbors, k",
    "V": "vocabulary size, V",
}
LIMIT = "limit"
#: There the product is torch's in float32, which a kernel may beat: a reader must not wonder.
_CPU_LIMIT = "measured limit: reads, or\ntorch's product in float32"
#: What an op does, for who does not know its name.
_OPS = {
    "knn_search": "The k nearest keys",
    "knn_softmax": "The neighbors as a distribution over the vocabulary",
    "knn_interpolate": "The neighbors mixed with a language model",
    "knn_target_log_prob": "The neighbors' log p of one target each",
    "key_sqnorms": "Squared norms of the keys",
    "rescore": "Distances to keys that were chosen",
    "merge_topk": "The k nearest of several parts, merged",
}
#: What the legend says; other names are said with spaces.
_WORDS = {
    LIMIT: "measured limit",
    "knnext_sqnorms": "knnext, norms given",
    "bare_product": "matrix product alone",
    "bare_zeros": "zeros alone",
    "bare_log_softmax": "log-softmax alone",
    "torch_eager": "torch",
    "torch_topk": "torch.topk",
    "torch_gather": "torch, rows gathered",
    "torch_vector_norm": "torch, vector norm",
    "torch_float_square_sum": "torch, squares summed",
    "torch_compiled": "torch.compile",
    "torch_chunked": "torch, in chunks",
    "torch_chunked_float32": "torch, in chunks, float32",
    "torch_probabilities": "torch, in probabilities",
    "torch_whole_row": "torch, whole row",
    "torch_masked": "torch, masked",
    "compiled_masked": "torch.compile, masked",
    "faiss_flat": "FAISS flat",
    "knnext_codes": "knnext, eight-bit codes",
    "faiss_ivfpq": "FAISS IVF-PQ",
    "faiss_sq_fp16": "FAISS scalar quantizer, float16",
    "faiss_sq8": "FAISS scalar quantizer, 8 bits",
    "svs_flat": "SVS flat",
    "usearch_exact": "usearch, exhaustive",
    "usearch_i8": "usearch, exhaustive, int8",
    "scann_brute_force": "ScaNN brute force",
    "cuvs_brute_force": "cuVS brute force",
    **{f"faiss_gpu_flat_{t}": f"FAISS GPU flat, {t}" for t in ("float16", "float32")},
    **{f"faiss_knn_gpu_{t}": f"FAISS kNN, {t}" for t in ("float16", "bfloat16", "float32")},
}


@dataclass(frozen=True)
class Line:
    name: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Picture:
    """Lines over one axis; `fixed` holds the shape's other sizes."""

    device: str
    op: str
    axis: str
    fixed: tuple[tuple[str, Any], ...]
    lines: list[Line]

    @property
    def file_name(self) -> str:
        sizes = "-".join(
            f"{axis}{value}" if axis in _NAMES or axis in "Dm" else str(value)
            for axis, value in self.fixed
        )
        return f"{self.device}-{self.op}-by-{self.axis}-{sizes}.png"

    @property
    def title(self) -> str:
        fixed = dict(self.fixed)
        kind = KEYS.get(fixed.pop("keys", ""), "")
        dtype = fixed.pop("dtype", "")
        parts = [f"{axis} = {count(value)}" for axis, value in fixed.items()]
        what = f"{_OPS[self.op]} ({self.op})" if self.op in _OPS else self.op
        return f"{what}\n" + ", ".join([*parts, *filter(None, (dtype, kind))])


def pictures(rows: Sequence[Row], axes: str = "QNkV") -> Iterator[Picture]:
    """Every set of shapes that differ in one of the axes alone.

    Of three values or more on a CPU; of four on a GPU, whose many shapes come together in threes by
    chance.
    """
    for axis in axes:
        families: dict[object, list[Row]] = {}
        for row in rows:
            if axis in row.facts and axis in dict(row.shape):
                fixed = tuple((a, v) for a, v in row.shape if a != axis)
                families.setdefault((row.device, row.op, fixed), []).append(row)
        for (device, op, fixed), members in families.items():
            if len({row[axis] for row in members}) >= (4 if device == "cuda" else 3):
                yield Picture(device, op, axis, fixed, _lines(members, axis, device))


def _lines(rows: Sequence[Row], axis: str, device: str) -> list[Line]:
    points: dict[str, list[tuple[float, float]]] = {}
    for group in grouped(rows).values():
        ours = baseline(group)
        unit = 1e-3 if device == "cuda" else ours.seconds if ours else None
        if unit is None:
            continue
        for row in group:
            ratio = None if device == "cuda" else relative(row, group)
            y = row.seconds / unit if ratio is None else ratio
            points.setdefault(full_name(row), []).append((row[axis], y))
        least = _limit_seconds(group)
        if least is not None:
            points.setdefault(LIMIT, []).append((group[0][axis], least / unit))
    return [Line(name, *map(list, zip(*sorted(p), strict=True))) for name, p in points.items()]


def _limit_seconds(group: Sequence[Row]) -> float | None:
    """The least time by the measured rates, which is the same seen from any row."""
    ours = baseline(group) or group[0]
    return ours["share_of_limit"] * ours.seconds if ours["share_of_limit"] else None


def draw(picture: Picture, folder: Path) -> Path:
    """Saves the picture and returns where; ImportError, with what to install, where it cannot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    looks = _looks([line.name for line in picture.lines])
    for line in picture.lines:
        axes.plot(line.x, line.y, label=_label(picture, line), **looks[line.name])
    _dress(axes, picture)
    path = folder / picture.file_name
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    return path


def words(name: str) -> str:
    """A line's name as a reader says it."""
    start, bracket, rest = name.partition(" (")
    rest = rest.replace("sm90", "Hopper kernels")
    return _WORDS.get(start, start.replace("_", " ")) + bracket + rest


def _label(picture: Picture, line: Line) -> str:
    return _CPU_LIMIT if (picture.device, line.name) == ("cpu", LIMIT) else words(line.name)


def _looks(names: Sequence[str]) -> Mapping[str, dict[str, Any]]:
    """Ours thick, the limit a thin black line without marks, each family of rivals one color."""
    seen: dict[str, int] = {}
    looks = {}
    for name in names:
        if name == LIMIT:
            looks[name] = {"color": INK, "lw": 1.2, "ls": (0, (1, 1)), "zorder": 1}
            continue
        color = _color(name)
        nth = seen[color] = seen.get(color, -1) + 1
        looks[name] = {
            "color": color,
            "marker": _MARKS[nth % len(_MARKS)],
            "ms": 5,
            "ls": _STYLES[nth % len(_STYLES)],
            "lw": 2.4 if name.startswith("knnext") else 1.4,
            "zorder": 4 if name.startswith("knnext") else 3,
        }
    return looks


def _color(name: str) -> str:
    if name.startswith("knnext") and name.endswith("(sm90)"):
        return _HOPPER
    return next((color for start, color in _FAMILIES.items() if name.startswith(start)), _OTHER)


def _dress(axes: Any, picture: Picture) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    values = sorted({x for line in picture.lines for x in line.x})
    axes.set_xticks(values, _labels(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(_minor_label(axes)))
    axes.tick_params(which="both", labelsize=8, colors=MUTED)
    axes.set_xlabel(_NAMES[picture.axis], color=MUTED)
    unit = "time, ms" if picture.device == "cuda" else "time relative to knnext"
    axes.set_ylabel(f"{unit} (lower is better)", color=MUTED)
    axes.set_title(picture.title, loc="left", fontsize=10, color=INK)
    axes.grid(which="major", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _legend(axes, picture)


def _labels(values: Sequence[float]) -> list[str]:
    """One for each value, empty where it would run into the one before."""
    room = 0.07 * (math.log(values[-1]) - math.log(values[0]))
    labels: list[str] = []
    last = -math.inf
    for x in values:
        fits = math.log(x) - last >= room
        labels.append(count(int(x)) if fits else "")
        last = math.log(x) if fits else last
    return labels


def _minor_label(axes: Any):
    """Twos and fives between powers of ten, where the axis spans less than two of these."""

    def label(y: float, _: Any) -> str:
        low, high = axes.get_ylim()
        first = f"{y:e}"[0]
        return f"{y:g}" if high / low < 100 and first in "25" else ""

    return label


def _legend(axes: Any, picture: Picture) -> None:
    """Beside the lines, in the order in which these end at the right."""
    handles, labels = axes.get_legend_handles_labels()
    last = {_label(picture, line): (line.x[-1], line.y[-1]) for line in picture.lines}
    order = sorted(range(len(labels)), key=lambda i: -last[labels[i]][1])
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
