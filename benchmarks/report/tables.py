"""Rows as Markdown: one table for each op, the targets, and the limits that were measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.report.rows import AXES, Row
from benchmarks.report.targets import Target, Verdict, verdicts

OPS = (
    *("knn_search", "knn_softmax", "knn_interpolate", "knn_target_log_prob"),
    *("key_sqnorms", "rescore", "merge_topk"),
)
#: What a reader calls the keys that are not made up.
KEYS = {"lm": "real keys", "smollm2": "real keys of SmolLM2"}
_COLUMNS = (
    *("shape", "implementation", "time / knnext", "time", "GB/s", "FLOP/s"),
    *("of the limit", "of the bare product", "recall", "memory"),
)


def grouped(rows: Iterable[Row]) -> dict[object, list[Row]]:
    """Rows that may be compared, in the order in which they come."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def baseline(group: Sequence[Row]) -> Row | None:
    """Our own row: with this run's kernels where only those of Hopper ran."""
    names = ("knnext", "knnext (sm90)")
    return next((r for name in names for r in group if r.implementation == name), None)


def relative(row: Row, group: Sequence[Row]) -> float | None:
    """Times knnext's: by rounds in turns with it where these were measured, or of the two rows."""
    ours = baseline(group)
    if row["times_knnext"] is not None:
        return float(row["times_knnext"])
    return row.seconds / ours.seconds if ours else None


def full_name(row: Row) -> str:
    return f"{row.implementation} (approximate)" if row.approximate else row.implementation


def op_table(rows: Sequence[Row], op: str, device: str) -> list[str]:
    """Markdown lines; times in absolute units for GPUs only, and no column without a value."""
    lines = [
        _cells(row, group, device)
        for group in grouped(r for r in rows if r.op == op and r.device == device).values()
        for row in sorted(group, key=lambda r: _rank(r, group))
    ]
    return _markdown(_COLUMNS, _shapes_once(lines))


def _rank(row: Row, group: Sequence[Row]) -> tuple[bool, float]:
    """Ours first, then the fastest."""
    ratio = relative(row, group)
    return row is not baseline(group), row.seconds if ratio is None else ratio


def _shapes_once(lines: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    previous, out = None, []
    for shape, *rest in lines:
        out.append(("" if shape == previous else shape, *rest))
        previous = shape
    return out


def _cells(row: Row, group: Sequence[Row], device: str) -> tuple[str, ...]:
    ratio = relative(row, group)
    name = f"**{row.implementation}**" if row.implementation.startswith("knnext") else None
    return (
        shape_text(row),
        name or full_name(row),
        "" if ratio is None else number(ratio),
        duration(row.seconds) if device == "cuda" else "",
        *(("",) * 4 if row.approximate else _rates(row, device)),
        "" if row["recall"] is None else f"{row['recall']:.4f}",
        "" if row["peak_memory"] is None else size(row["peak_memory"]),
    )


def _rates(row: Row, device: str) -> tuple[str, ...]:
    return (
        number(row["gbps"]) if row["gbps"] else "",
        operations(row["tflops"], device),
        percent(row["share_of_limit"]),
        percent(row["share_of_gemm"]),
    )


def _markdown(columns: Sequence[str], lines: Sequence[tuple[str, ...]]) -> list[str]:
    kept = [i for i in range(len(columns)) if i < 2 or any(line[i] for line in lines)]
    head = [columns[i] for i in kept]
    rule = ["---" if i < 2 else "---:" for i in kept]
    body = [[line[i] for i in kept] for line in lines]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]


def targets_table(rows: Sequence[Row]) -> list[str]:
    """A line for each target whose shapes are among the rows, with the worst of these."""
    by_target: dict[Target, list[Verdict]] = {}
    for verdict in verdicts(rows):
        by_target.setdefault(verdict.target, []).append(verdict)
    columns = ("op", "wanted", "kernels", "shapes", "met", "worst", "where")
    lines = [_target_cells(target, found) for target, found in by_target.items()]
    return _markdown(columns, lines) if lines else []


def _target_cells(target: Target, found: Sequence[Verdict]) -> tuple[str, ...]:
    worst = (max if target.at_most else min)(found, key=lambda verdict: verdict.value)
    met = sum(verdict.met for verdict in found)
    return (
        target.op,
        f"{target.wanted} {target.what}",
        target.kernels,
        str(len(found)),
        "yes" if met == len(found) else f"**no**, {met} of them" if met else "**no**",
        target.shown(worst.value),
        shape_text(worst.row),
    )


def limits_line(rows: Sequence[Row], device: str) -> str:
    """Measured bandwidths and products, by dtype."""
    facts = [r.facts for r in rows if r.device == device]
    parts = []
    for name, text in (("limit_read_gbps", "reads"), ("limit_copy_gbps", "copies")):
        values = [f[name] for f in facts if name in f]
        by = next((f["limit_read_by"] for f in facts if "limit_read_by" in f), None)
        how = f" (by {by})" if by and text == "reads" else ""
        parts += [f"{text} {number(max(values))} GB/s{how}"] if values else []
    unit, factor = ("TFLOP/s", 1.0) if device == "cuda" else ("GFLOP/s", 1e3)
    products = {
        f.get("dtype", "float32") if device == "cuda" else "float32": f["limit_tflops"]
        for f in facts
        if "limit_tflops" in f
    }
    parts += [
        f"{dtype} products {number(factor * rate)} {unit}" for dtype, rate in products.items()
    ]
    return "Measured limits: " + ", ".join(parts) + "." if parts else ""


def shape_text(row: Row) -> str:
    parts = []
    for axis, value in row.shape:
        if axis in AXES[:6]:
            parts.append(f"{axis} = {count(value)}")
        elif value != "gaussian":
            parts.append(KEYS.get(value, str(value)))
    return ", ".join(parts) or str(row["shape"])


def number(value: float) -> str:
    """Three digits, never in scientific notation."""
    for bound, digits in ((0.01, 4), (0.1, 3), (10, 2), (100, 1)):
        if value < bound:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def count(value: int) -> str:
    """Separators from five digits on, as in running text."""
    return f"{value:,}" if value >= 10_000 else str(value)


def operations(tflops: float | None, device: str) -> str:
    if not tflops:
        return ""
    return f"{number(tflops)} T" if device == "cuda" else f"{number(1e3 * tflops)} G"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{number(seconds * factor)} {unit}"
    return f"{number(1e6 * seconds)} µs"


def size(count: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= factor:
            return f"{number(count / factor)} {unit}"
    return f"{count / 1e3:.0f} kB"
