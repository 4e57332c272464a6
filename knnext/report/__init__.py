"""The report: one HTML file with the table, the tuning surface and the token explorer.

Style, script and data are inside the file, so it opens from disk and loads nothing. Everything
that comes from a corpus or a path is escaped here or set as text by the script.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from knnext import __version__
from knnext.output import write_text
from knnext.report.continuations import Shown, continuations_section
from knnext.report.surface import Surface, surface_figure
from knnext.report.table import Row, format_bytes, results_table, text_table

__all__ = ["Report", "Row", "Surface", "format_bytes", "text_table", "write_report"]

_NO_TOKENS: dict[str, Any] = {
    "k": 0, "systems": [], "documents": [], "vocab": [], "spans": [], "excerpts": []
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What the page shows.

    Attributes:
        title: the finding, in one line.
        lead: a sentence or two below it.
        rows: the systems compared; the first is the base that the others are compared with.
        note: what the figures of the table mean.
        surface: validation perplexity over the grid, or None.
        facts: names and values of the section "What was run".
        explorer: from `knnext.report.explorer.explorer_data`, or None.
        continuations: from `knnext.report.continuations.in_words`.
    """

    title: str
    lead: str
    rows: Sequence[Row]
    note: str = ""
    surface: Surface | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    explorer: Mapping[str, Any] | None = None
    continuations: Sequence[Shown] = ()


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page and return its path; it appears under its name when whole."""
    # A lone surrogate, from a file name that is not UTF-8, must not end a report.
    write_text(path, render(report), errors="replace")
    return Path(path)


def render(report: Report) -> str:
    """The page as text."""
    surface = surface_figure(report.surface) if report.surface else "<p>No grid was searched.</p>"
    return fill(
        part(__name__, "page.html"),
        {
            **explorer_parts(),
            "title": html.escape(report.title),
            "lead": html.escape(report.lead),
            "table": results_table(report.rows),
            "note": html.escape(report.note),
            "contents": _contents(report),
            "continuations": continuations_section(report.continuations),
            "surface": surface,
            "facts": _facts(report.facts),
            "version": html.escape(__version__),
            "report": part(__name__, "report.js"),
            "data": script_json(report.explorer or _NO_TOKENS),
        },
    )


def script_json(data: Any) -> str:
    """JSON that may stand in a script element: no character in it can end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # "<" covers "</script" and "<!--"; the two line separators end a line in older JavaScript.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def explorer_parts() -> dict[str, str]:
    """What every page with an explorer is made of: its style, its markup and its script."""
    names = {"style": "style.css", "explorer": "explorer.html"}
    scripts = (part(__name__, file) for file in ("passages.js", "explorer.js"))
    return {
        **{name: part(__name__, file) for name, file in names.items()},
        "script": "\n".join(scripts),
    }


def part(package: str, name: str) -> str:
    """A file that lies in a package."""
    return files(package).joinpath(name).read_text(encoding="utf-8").rstrip("\n")


def fill(page: str, parts: Mapping[str, str]) -> str:
    """Put the parts in place in one pass: what is put in is never read as a placeholder."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], page)


def _contents(report: Report) -> str:
    """Links to what lies below the explorer, where it is there."""
    there = {
        "surface-title": ("Temperature and λ", report.surface),
        "facts-title": ("What was run", report.facts),
        "continued-title": ("Test documents, continued", report.continuations),
    }
    links = [f'<a href="#{name}">{words}</a>' for name, (words, found) in there.items() if found]
    return f'<nav aria-label="On this page">{" ".join(links)}</nav>' if links else ""


def _facts(facts: Mapping[str, str]) -> str:
    lines = (
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in facts.items()
    )
    return '<dl class="facts">\n' + "\n".join(lines) + "\n</dl>"
