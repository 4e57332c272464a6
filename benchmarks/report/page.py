"""The page of a report and where it goes: benchmarks/README.md, with its pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.plots import draw, pictures
from benchmarks.report.rows import Row, Source, read, short_form, with_gemm_shares
from benchmarks.report.tables import OPS, limits_line, op_table, targets_table

HERE = Path(__file__).resolve().parents[1]
DEVICES = {"cuda": "On a GPU", "cpu": "On a CPU"}

HEAD = """\
# Benchmarks

Made by `python -m benchmarks.report` from {sources}; their story is in [LOG.md](LOG.md).

```
pip install ".[bench]"                      # in the checkout
make bench                                  # the short list; peers for a quarter of an hour
pytest benchmarks --full                    # every shape
python -m benchmarks.grid                   # where is a search slower than a rival's?
benchmarks/gpu_run.sh                       # everything that needs a GPU, in nine minutes
python -m benchmarks.report FILE.json       # this page, from --benchmark-json=FILE.json
```

How to read the tables:

- *time / knnext* is a ratio within one run; above 1, knnext is faster. On a CPU a search is timed
  in turns with knnext's, at the same number of threads. `knnext_sqnorms` is the same search with
  the keys' norms given, as a datastore has them; `knnext_codes` with eight-bit codes beside them.
- *GB/s* and *FLOP/s* count the least that the op must do: each input read once, each output
  written once, 2 Q N D operations for a search.
- *of the limit* sets the time against the nearer of two limits measured in the same run: memory
  bandwidth (reads for ops that read, copies for the others) and a large matrix product. On a CPU
  that product is torch's in float32, which a kernel may beat.
- *of the bare product*: the time of the same matrix product without selection, over the row's time.
  On a CPU the product counts the conversion of half-precision keys to float32.
- *recall* is the share of the true k nearest, by float64 on sampled queries, near-ties allowed for.
  What is marked as approximate trades it for time.
- *memory* is what a call takes beyond its inputs, results counted (GPU only).

A rival that was not installed has no row: the extra `bench` names SVS, usearch and ScaNN,
`faiss` FAISS. Real keys are hidden states of the demo's language model (D = 128) and, where
they were made, of SmolLM2-135M (D = 576; `python -m benchmarks.data.smollm2`): there is no offline
source of real keys with D = 1024.
"""


def gather(paths: Sequence[Path]) -> tuple[list[Source], list[Row]]:
    """Rows of all files; of one shape and implementation the first file's."""
    sources, rows = [], {}
    for path in paths:
        source, found = read(path)
        sources.append(source)
        for row in with_gemm_shares(found):
            rows.setdefault((row.group, row.implementation), row)
    return sources, list(rows.values())


def render(sources: Sequence[Source], rows: Sequence[Row], plots: Sequence[str]) -> str:
    """The page, as Markdown. `plots` are paths relative to it."""
    names = ", ".join(f"`{source.name}` ({source.date})" for source in sources)
    lines = [HEAD.format(sources=names)]
    for device, title in DEVICES.items():
        mine = [row for row in rows if row.device == device]
        if mine:
            lines += [f"## {title}", "", *_machine(sources, device), ""]
            lines += [limits_line(mine, device), ""]
            lines += _targets(mine)
            lines += _tables(mine, device)
            lines += _plots(plots, device)
    if not any(row.device == "cuda" for row in rows):
        lines += ["## On a GPU", "", "Nothing has been measured on a GPU yet.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _machine(sources: Sequence[Source], device: str) -> list[str]:
    """One sentence a file that has rows of this device's kind."""
    out = []
    for source in sources:
        facts = dict(source.machine)
        gpu = facts.pop("gpu", None)
        if device == "cuda" and gpu is None:
            continue
        head = gpu if device == "cuda" else f"{facts.get('cpu')}, {facts.get('threads')} threads"
        left_out = ("cpu", "threads", "gpu_memory", "kernels")
        rest = [f"{name} {value}" for name, value in facts.items() if name not in left_out]
        out.append(", ".join([str(head), *rest]) + ".")
    return list(dict.fromkeys(out))


def _targets(rows: Sequence[Row]) -> list[str]:
    table = targets_table(rows)
    return ["### Targets", "", *table, ""] if table else []


def _tables(rows: Sequence[Row], device: str) -> list[str]:
    lines = []
    for op in [*OPS, *sorted({row.op for row in rows} - set(OPS))]:
        if any(row.op == op for row in rows):
            lines += [f"### {op}", "", *op_table(rows, op, device), ""]
    return lines


def _plots(plots: Sequence[str], device: str) -> list[str]:
    mine = [plot for plot in plots if Path(plot).name.startswith(f"{device}-")]
    if not mine:
        return []
    images = [f"![{Path(plot).stem}]({plot})" for plot in mine]
    return ["### Pictures", "", *[line for image in images for line in (image, "")]]


def write(paths: Sequence[Path], page: Path, pictures_in: Path) -> list[Path]:
    """Writes page and pictures; returns what was written."""
    sources, rows = gather(paths)
    pictures_in.mkdir(parents=True, exist_ok=True)
    drawn = [draw(picture, pictures_in) for picture in pictures(rows)]
    page.parent.mkdir(parents=True, exist_ok=True)
    relative = [_relative(path, page.parent) for path in drawn]
    page.write_text(render(sources, rows, relative), encoding="utf-8")
    return [page, *drawn]


def _relative(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return path.resolve().as_posix()


def store(path: Path, name: str, command: str) -> Path:
    """Keeps a run's short form in results/ and returns where."""
    target = HERE / "results" / f"{name}.json"
    content = json.dumps(short_form(path, command), indent=1)
    target.write_text(content + "\n", encoding="utf-8")
    return target
