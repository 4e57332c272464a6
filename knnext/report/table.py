"""The results table, as HTML and for a terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from knnext.evaluation.bootstrap import FEW_DOCUMENTS


@dataclass(frozen=True)
class Row:
    """One system's figures on the test split.

    Attributes:
        name: of the system.
        perplexity: of a token.
        perplexity_interval: (low, high) of that.
        change: relative change of the perplexity against the base, -0.5 for half; None in the
            row of the base itself.
        change_interval: (low, high) of that, from a paired bootstrap.
        temperature, lmbda: as tuned on the validation split.
        tokens_per_second: of the whole evaluation: model, search and mixing.
        num_bytes: on disk, of all that the system needs beside the base model.
        num_documents: that the intervals are from; fewer than `FEW_DOCUMENTS` mark them.
        words: what the name means, for people.
    """

    name: str
    perplexity: float
    perplexity_interval: tuple[float, float]
    change: float | None = None
    change_interval: tuple[float, float] | None = None
    temperature: float | None = None
    lmbda: float | None = None
    tokens_per_second: float | None = None
    num_bytes: int | None = None
    num_documents: int | None = None
    words: str = ""


_HEADINGS = (
    "system",
    "perplexity",
    "against the base",
    "temperature",
    "λ",
    "tokens/s",
    "on disk",
)


def format_bytes(count: float) -> str:
    """``"512 B"``, ``"1.5 kB"``, ``"128 MB"``: three digits, powers of 1000."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = 0
    while count >= 999.5 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    digits = 0 if power == 0 or count >= 99.5 else 1
    return f"{count:.{digits}f} {units[power]}"


def results_table(rows: Sequence[Row]) -> str:
    """An HTML table; the lowest perplexity stands out.

    On a narrow page style.css makes a card of each row, in which a cell says its heading; the
    roles keep it a table for those who hear it.
    """
    best = min(rows, key=lambda row: row.perplexity) if rows else None
    lines = ['<table class="results cards" role="table">', '<thead role="rowgroup"><tr role="row">']
    lines += [f'<th scope="col" role="columnheader">{html.escape(h)}</th>' for h in _HEADINGS]
    lines += ["</tr></thead>", '<tbody role="rowgroup">']
    for row in rows:
        (name, _), *cells = _cells(row)
        words = f"<small>{html.escape(row.words)}</small>" if row.words else ""
        lines.append(f'<tr role="row"{" class=best" if row is best else ""}>')
        lines.append(f'<th scope="row" role="rowheader">{html.escape(name)}{words}</th>')
        for number, (heading, cell) in enumerate(zip(_HEADINGS[1:], cells, strict=True)):
            mark = _mark(row) if number < 2 else ""
            lines.append(_html_cell(heading, cell, mark, strong=number == 0))
        lines.append("</tr>")
    notes = [f'<p class="note">{html.escape(note)}</p>' for note in mark_notes(rows)]
    return "\n".join([*lines, "</tbody>", "</table>", *notes])


def text_table(rows: Sequence[Row]) -> str:
    """The same for a terminal, aligned in columns."""
    headings = ["lmbda" if heading == "λ" else heading for heading in _HEADINGS]
    cells = [headings] + [
        [
            f"{main}  [{interval}]{_mark(row)}" if interval else main
            for main, interval in _cells(row)
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADINGS))]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    words = [f"{row.name}: {row.words}" for row in rows if row.words]
    notes = [*mark_notes(rows), *(["", *words] if words else [])]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *notes])


def mark_notes(rows: Sequence[Row]) -> list[str]:
    """What the mark at an interval means, where one of the rows has it."""
    few = {r.num_documents for r in rows if _mark(r) and any(text for _, text in _cells(r))}
    return [
        f"* from {count} documents: of fewer than {FEW_DOCUMENTS} intervals are mostly too narrow"
        for count in sorted(few, key=lambda count: count or 0)
    ]


def _mark(row: Row) -> str:
    few = row.num_documents is not None and row.num_documents < FEW_DOCUMENTS
    return "*" if few else ""


def _html_cell(heading: str, cell: tuple[str, str], mark: str = "", strong: bool = False) -> str:
    main, interval = map(html.escape, cell)
    main = f"<strong>{main}</strong>" if strong else f"<span>{main}</span>"
    more = f"<small>{interval}{mark}</small>" if interval else ""
    return f'<td role="cell" data-label="{html.escape(heading)}">{main}{more}</td>'


def _cells(row: Row) -> list[tuple[str, str]]:
    """(main text, interval or "") of each column."""
    change = "–" if row.change is None else _percent(row.change)
    return [
        (row.name, ""),
        (_number(row.perplexity), _interval(row.perplexity_interval, _number)),
        (change, _interval(row.change_interval, _percent)),
        ("–" if row.temperature is None else f"{row.temperature:.3g}", ""),
        ("–" if row.lmbda is None else f"{row.lmbda:.3g}", ""),
        ("–" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}", ""),
        ("–" if row.num_bytes is None else format_bytes(row.num_bytes), ""),
    ]


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def _percent(change: float) -> str:
    return f"{100 * change:+.1f} %".replace("-", "−")


def _interval(interval: tuple[float, float] | None, form: Callable[[float], str]) -> str:
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    return " to ".join(map(form, interval))
