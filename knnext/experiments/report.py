"""One page that joins the experiments of a folder: claim, paper's figure, ours, agreement, plot.

`report.html` is one file without script that loads nothing; `report.md` is its first table, for
READMEs and notes. Both are made from the JSON results alone.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from knnext import __version__
from knnext.experiments.catalog import NAMES
from knnext.experiments.lab.results import load_result
from knnext.output import write_text
from knnext.progress import format_duration
from knnext.say import to_log

Result = Mapping[str, Any]

#: How far a figure of the paper can be trusted, as a reader sees it.
SOURCES = {
    "code": "from the published code and its result files",
    "digest": "second-hand, from a digest of the paper",
    "recalled": "recalled, unverified",
}
_SHORT = {"code": "", "digest": " (digest)", "recalled": " (recalled, unverified)"}
_PLURAL = {"agrees": "agree", "agrees in part": "agree in part", "disagrees": "disagree"}
_HEADINGS = ("experiment", "claim", "paper", "ours", "agreement")
_MOST_FIGURES = 2  # of the paper in the first table
_CLASSES = {"agrees": "yes", "agrees in part": "part", "disagrees": "no", "undecided": "open"}


def write_report(
    folder: Path, names: Sequence[str] = NAMES, say: Callable[[str], None] = to_log
) -> list[Path]:
    """Write `report.html` and `report.md` from the results in `folder`; returns their paths.

    ValueError where the folder holds no result; experiments that have not run are named.
    """
    found = {n: load_result(p) for n in names if (p := folder / f"{n}.json").exists()}
    if not found:
        raise ValueError(f"{folder} holds no results: run `knnext experiment all --out {folder}`")
    missing = [name for name in names if name not in found]
    if missing:
        say(f"not run yet: {', '.join(missing)}")
    pages = {
        "report.html": render(found, folder, missing),
        "report.md": f"# The experiments\n\n{markdown_table(found)}",
    }
    for name, text in pages.items():
        write_text(folder / name, text, errors="replace")
    say(f"wrote {folder / 'report.html'} and {folder / 'report.md'}")
    return [folder / name for name in pages]


def markdown_table(results: Mapping[str, Result]) -> str:
    """The table of claims: experiment, claim, paper, ours, agreement."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    for name, result in results.items():
        cells = (
            name,
            result["claim"],
            _paper_text(result),
            result["headline"],
            result["agreement"],
        )
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _paper_text(result: Result) -> str:
    """The first figures, each with its mark; the section of the experiment has all of them."""
    shown = [f["text"] + _SHORT[f["source"]] for f in result["paper"][:_MOST_FIGURES]]
    more = len(result["paper"]) - len(shown)
    return "; ".join(shown + [f"{more} more"] * (more > 0)) or "–"


def render(results: Mapping[str, Result], folder: Path, missing: Sequence[str] = ()) -> str:
    """The page."""
    style = files("knnext.report").joinpath("style.css").read_text(encoding="utf-8")
    style += files("knnext.experiments").joinpath("report.css").read_text(encoding="utf-8")
    first = next(iter(results.values()))
    counts = {a: sum(r["agreement"] == a for r in results.values()) for a in _CLASSES}
    tally = ", ".join(f"{count} {_PLURAL.get(a, a)}" for a, count in counts.items() if count)
    preset = first["preset"]
    lead = (
        f"{len(results)} experiments on {preset['corpus']}, preset {preset['name']}: {tally}. "
        "Figures are of the test split, fitted on the validation split, with 95 % intervals by "
        "bootstrap over documents, unless a row says otherwise."
    )
    left = f"<p class=note>Not run: {html.escape(', '.join(missing))}.</p>" if missing else ""
    sections = "\n".join(_section(name, r, folder) for name, r in results.items())
    parts = {
        "style": style,
        "lead": html.escape(lead),
        "table": _summary(results),
        "left": left,
        "sections": sections,
        "facts": _facts(first),
        "version": html.escape(__version__),
    }
    page = files("knnext.experiments").joinpath("report.html").read_text(encoding="utf-8")
    # One pass, so that what is put in is not searched for further names.
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], page)


def _summary(results: Mapping[str, Result]) -> str:
    """As cards on a narrow page; the roles keep it a table for those who hear it."""
    rows = []
    for name, r in results.items():
        cells = (
            html.escape(r["claim"]),
            html.escape(_paper_text(r)),
            html.escape(r["headline"]),
            _badge(r["agreement"]),
        )
        row = f"<th scope=row role=rowheader><a href='#{name}'>{html.escape(r['title'])}</a></th>"
        for heading, cell in zip(_HEADINGS[1:], cells, strict=True):
            row += f"<td role=cell data-label='{heading}'>{cell}</td>"
        rows.append(f"<tr role=row>{row}</tr>")
    heads = "".join(f"<th scope=col role=columnheader>{h}</th>" for h in _HEADINGS)
    return (
        "<table class='claims cards' role=table>"
        f"<thead role=rowgroup><tr role=row>{heads}</tr></thead>"
        f"<tbody role=rowgroup>{''.join(rows)}</tbody></table>"
    )


def _badge(agreement: str) -> str:
    return f"<span class='badge {_CLASSES[agreement]}'>{html.escape(agreement)}</span>"


def _section(name: str, result: Result, folder: Path) -> str:
    paper = "".join(
        f"<li>{html.escape(f['text'])} <span class=muted>({SOURCES[f['source']]})</span></li>"
        for f in result["paper"]
    )
    seconds = result["seconds"]
    shared = format_duration(seconds["shared steps"])
    spent = f"{format_duration(seconds['all'])}, of which shared steps {shared}"
    title = html.escape(result["title"])
    return (
        f"<section id='{name}'><h2>{title} {_badge(result['agreement'])}</h2>"
        f"<p>{html.escape(result['question'])}</p>"
        f"<p><b>Claim.</b> {html.escape(result['claim'])}</p>"
        + (f"<ul class=paper>{paper}</ul>" if paper else "")
        + f"<p><b>Here.</b> {html.escape(result['words'])}</p>"
        + _figure(name, result, folder)
        + f"<details><summary>Figures in numbers</summary>{_table(result['rows'])}</details>"
        f"<p class=note>Varies: {html.escape(result['varies'])}. <code>knnext experiment {name}"
        f"</code>, {spent}.</p></section>"
    )


def _figure(name: str, result: Result, folder: Path) -> str:
    path = folder / f"{name}.png"
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    alt = html.escape(f"Plot of {result['title']}: {result['words']}", quote=True)
    return f"<figure><img alt='{alt}' src='data:image/png;base64,{data}'></figure>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p class=note>No rows.</p>"
    names = list(rows[0])
    head = "".join(f"<th scope=col>{html.escape(n)}</th>" for n in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(shown(row.get(n)))}</td>" for n in names) + "</tr>"
        for row in rows
    )
    return (
        "<div class=scroll tabindex=0 role=region aria-label='Figures in numbers'>"
        f"<table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def shown(value: Any) -> str:
    """A table's cell as text: four digits of a number, a dash for None, `[low, high]`."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(v) for v in value) + "]"
    return str(value)


def _facts(result: Result) -> str:
    preset, machine = result["preset"], result["machine"]
    model = preset["model"] or (
        f"GPT-2 of {preset['train']['num_layers']} layers, dim {preset['train']['dim']}, "
        f"{preset['train_steps']:,} steps of "
        f"{preset['train']['batch_size'] * preset['train']['block_size']:,} tokens"
    )
    entries = {
        "preset": preset["name"],
        "corpus": preset["corpus"],
        "model": model,
        "datastore": f"at most {preset['entries']:,} entries, k = {preset['k']:,}",
        "tokens": f"about {preset['valid_tokens']:,} valid, {preset['test_tokens']:,} test",
        "seeds": shown(list(preset["seeds"])),
        "machine": f"{machine['processor']}, {machine['threads']} threads, "
        f"{machine['gpu'] or 'no GPU'}",
        "versions": ", ".join(f"{n} {v}" for n, v in result["versions"].items()),
        "date": result["date"],
    }
    pairs = "".join(
        f"<dt>{html.escape(n)}</dt><dd>{html.escape(str(v))}</dd>" for n, v in entries.items()
    )
    return f"<dl class=facts>{pairs}</dl>"
