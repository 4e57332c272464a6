"""Exact search on paper, to 10^12 keys: the tables and the figure of docs/scale.md.

``python -m knnext.planning docs`` writes them from the plan's own arithmetic and stated rates, so
that they never say something else than ``knnext plan`` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from knnext.output import whole_file, write_text
from knnext.planning.job import Job
from knnext.planning.model_shape import described
from knnext.planning.placement import place
from knnext.planning.plan import make_plan
from knnext.planning.rates import Rates
from knnext.planning.search_time import LocalSearch, batch_time
from knnext.planning.simulation import Simulation, Wires
from knnext.planning.stated import STATED
from knnext.planning.traffic import ANSWER_BYTES
from knnext.planning.words import duration, scaled

DIM, K, NODE = 1024, 1024, 8
#: The paper's model and width, on nodes of eight GPUs.
BASE = Job(112_733_184, described(DIM, 16, 269.8e6), gpus=NODE, nodes=2, k=K)
STORES = (
    (112_733_184, "the paper's"),
    (600 * 10**6, "the largest that users report"),
    (3 * 10**9, "Wikipedia in many languages"),
    (10**10, ""),
    (10**11, ""),
    (10**12, ""),
)
FIGURE = "images/scale.png"
_MOST_CHUNKS = 64
_BATCHES = 3


def _whole(job: Job, rates: Rates) -> Job:
    """The job on as many nodes as keep all its keys resident."""
    ranks = make_plan(job, rates).resident_ranks
    assert ranks is not None
    return replace(job, nodes=ranks // NODE)


def _seconds(job: Job, rates: Rates) -> float:
    """Of 1,000 queries, among many."""
    time = batch_time(job, place(job, rates.machine), rates)
    return time.each() * 1000 / job.batch_queries


# Tables


def stores_table() -> str:
    """What each store takes, and what it takes to keep it in GPU memory."""
    rates = STATED["h200"]
    rows = []
    for tokens, name in STORES:
        few = replace(BASE, tokens=tokens)
        many = _whole(few, rates)
        where = place(few, rates.machine).tier.removeprefix("keys ")
        rows.append(
            [
                f"{_power(tokens)}{f' ({name})' if name else ''}",
                f"{scaled(few.disk()['datastore'])}B",
                f"{duration(_seconds(few, rates))}, {where}",
                f"{many.ranks:,}",
                duration(_seconds(many, rates)),
                _bound(many, rates),
            ]
        )
    head = [
        *("keys", "on disk", "1,000 queries, 16 GPUs", "GPUs that hold the keys"),
        *("1,000 queries there", "which waits for"),
    ]
    return _table(head, rows)


def crossings_table() -> str:
    """Where one resource takes over from another; each by a formula that holds for any size."""
    rows = []
    for name in ("h200", "a100", "cpu"):
        rates = STATED[name]
        flops = rates["search_flops.float16"]
        near = rates["search_bytes.float16"]
        copy = rates["host_to_device"] if "host_to_device" in rates.rates else None
        drive = rates["disk_read"] / max(1, rates.machine.gpus)
        answers = K * ANSWER_BYTES + 2 * DIM
        rows.append(
            [
                rates.machine.name.removesuffix(", as stated"),
                _count(flops / near),
                "none" if copy is None else _count(flops / copy),
                _count(flops / drive),
                _count(answers * flops / (2 * DIM * rates["network"])),
                _count(rates["latency"] * flops / (2 * DIM * 1000)),
            ]
        )
    head = [
        *("", "queries: memory", "queries: PCIe", "queries: a drive a node"),
        *("rows a rank: network", "rows a rank: latency"),
    ]
    return _table(head, rows)


def changes_table() -> str:
    """10^12 keys: what each change makes of ranks, time and traffic."""
    rates = STATED["h200"]
    job = _whole(replace(BASE, tokens=10**12), rates)
    time, ranks = batch_time(job, place(job, rates.machine), rates), job.ranks
    answers = ranks * K * ANSWER_BYTES
    network = answers * (1 - NODE / ranks)  # what a query's answers carry between nodes

    def searched(read: float, compute: float) -> float:
        """Seconds of 1,000 queries where the search reads and computes so much of it all."""
        local = LocalSearch(time.search.compute * compute, time.search.read * read)
        return replace(time, search=local).each() * 1000 / job.batch_queries

    half, fine = rates["search_flops.float16"] / rates["codes_flops"], math.ceil(ranks / 2)
    part = answers_a_shard(K, ranks)
    rows: list[tuple[str, str, float, float, str]] = [
        ("exact, as it is", f"{ranks:,}", searched(1, 1), network, "the bits of one process"),
        (
            "codes resident, keys elsewhere",
            *(f"{fine:,}", 2 * searched(0.5, half), network / 2, "the same bits"),
        ),
        (
            "answers merged in each node first",
            *(f"{ranks:,}", searched(1, 1), network / NODE, "the same bits"),
        ),
        (
            f"{part:,} answers a shard, and more where they might not do",
            *(f"{ranks:,}", searched(1, 1), network * part / K, "the same bits"),
        ),
        (
            "1 of 128 lists visited (nprobe 32 of 4,096)",
            *(f"{ranks:,}", searched(1 / 128, 1 / 128), network, "approximate"),
        ),
        (
            "keys of 256 dimensions",
            *(f"{math.ceil(ranks / 4):,}", searched(1, 1), network / 4, "another store's"),
        ),
        (
            "four copies of everything",
            *(f"{4 * ranks:,}", searched(1, 1) / 4, network, "the same bits"),
        ),
    ]
    shown = [
        [name, gpus, duration(seconds), f"{scaled(sent)}B", kept]
        for name, gpus, seconds, sent, kept in rows
    ]
    head = [
        *("change", "GPUs", "1,000 queries", "a query's answers between nodes"),
        "what it finds",
    ]
    return _table(head, shown)


def answers_a_shard(k: int, ranks: int) -> int:
    """Of k neighbors, how many a shard of random rows holds but once in 10^9 times."""
    mean = k / ranks
    return min(k, math.ceil(mean + 6 * math.sqrt(mean) + 12))


def simulation_table() -> str:
    """Formula and simulation side by side."""
    rates = STATED["h200"]
    rows = []
    for tokens, nodes in ((112_733_184, 1), (10**9, 2), (3 * 10**9, 2), (10**6, 2)):
        job = replace(BASE, tokens=tokens, nodes=nodes)
        time = batch_time(job, place(job, rates.machine), rates)
        even, uneven = (_simulated(job, rates, spread) for spread in (0.0, 0.2))
        rows.append(
            [
                *(_power(tokens), f"{job.ranks}", place(job, rates.machine).tier),
                *(f"{time.batches(_BATCHES) / even:.3f}", f"{uneven / even:.2f}"),
            ]
        )
    head = ["keys", "ranks", "rows", "formula / simulation", "ranks up to 20 % slower"]
    return _table(head, rows)


def _simulated(job: Job, rates: Rates, spread: float = 0.0) -> float:
    time = batch_time(job, place(job, rates.machine), rates)
    # So many chunks show how they follow each other; a store on disk has half a million of them.
    search = replace(time.search, chunks=min(time.search.chunks, _MOST_CHUNKS))
    time = replace(time, search=search)
    wires = Wires(rates["network"], rates["link"], rates["latency"])
    return Simulation(job.traffic, wires, time, _BATCHES, spread=spread).run()


TABLES: dict[str, Callable[[], str]] = {
    "stores": stores_table,
    "crossings": crossings_table,
    "changes": changes_table,
    "simulation": simulation_table,
}


def with_tables(text: str) -> str:
    """The document with each table between its two comments made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: python -m knnext.planning docs -->", f"<!-- {name} ends -->"
        pattern = re.escape(begin) + r"\n.*?" + re.escape(end)
        table = f"{begin}\n{make()}\n{end}"
        text, found = re.subn(pattern, table.replace("\\", r"\\"), text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"the document has {found} places for the table {name!r}, want one")
    return text


def write(docs: Path) -> None:
    """Make the tables of ``scale.md`` anew, and the figure that it shows."""
    page = docs / "scale.md"
    write_text(page, with_tables(page.read_text(encoding="utf-8")))
    (docs / FIGURE).parent.mkdir(exist_ok=True)
    with whole_file(docs / FIGURE) as part:
        draw().savefig(part, format="png", dpi=110, facecolor="white", metadata={"Software": None})


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _power(count: int) -> str:
    digits, power = f"{count:.3g}", int(math.log10(count))
    return f"10^{power}" if count == 10**power else f"{float(digits) / 10**power:g} x 10^{power}"


def _count(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}"


def _bound(job: Job, rates: Rates) -> str:
    time = batch_time(job, place(job, rates.machine), rates)
    return "the exchange" if time.exchange > time.search.seconds else time.search.bound


# The figure

_INK, _MUTED = "#1f2933", "#52606d"
#: Colour and stroke of each resource: told apart also where colours are not.
_LOOKS = {
    "arithmetic": ("#1f2933", "-"),
    "GPU memory": ("#1a9c7e", "--"),
    "PCIe": ("#c99700", "-."),
    "disk": ("#d9710f", (0, (6, 1, 1, 1, 1, 1))),
    "network": ("#1f5fa8", ":"),
}


def draw() -> Any:
    """Seconds of 1,000 queries by number of keys, resource by resource, on two sets of machines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rates = STATED["h200"]
    keys = [int(10 ** (8 + step / 8)) for step in range(33)]
    two = [replace(BASE, tokens=count) for count in keys]
    _draw_lines(left, keys, two, rates)
    left.set_title("16 H200 in 2 nodes", color=_INK, loc="left")
    many = [_whole(job, rates) for job in two]
    _draw_lines(right, keys, many, rates)
    right.set_title("as many H200 as hold the keys", color=_INK, loc="left")
    for axes, jobs in ((left, two[::8]), (right, [job for job in many if job.ranks <= 32][::4])):
        seen = [_simulated(job, rates) / _BATCHES * 1000 / job.batch_queries for job in jobs]
        label = "simulated"
        axes.plot([j.tokens for j in jobs], seen, "o", ms=7, mfc="none", mec=_INK, label=label)
    left.set_ylabel("predicted seconds of 1,000 queries, log scale", color=_MUTED)
    # Beside the panels, where it covers no line.
    figure.legend(
        *left.get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=7
    )
    for axes in (left, right):
        axes.set_xlabel(f"keys, log scale (D = {DIM:,}, float16, k = {K:,})", color=_MUTED)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_MUTED)
        axes.grid(alpha=0.2)
    return figure


def _draw_lines(axes: Any, keys: list[int], jobs: list[Job], rates: Rates) -> None:
    lines: dict[str, list[float]] = {name: [] for name in _LOOKS}
    total = []
    for job in jobs:
        time = batch_time(job, place(job, rates.machine), rates)
        rows, each = job.shard_rows * job.key_bytes, 1000 / job.batch_queries
        sources = {
            "GPU memory": rates["search_bytes.float16"],
            "PCIe": min(rates["host_to_device"], rates["memory_read"] / NODE),
            "disk": rates["disk_read"] / job.ranks,
        }
        lines["arithmetic"].append(time.search.compute * each)
        lines["network"].append(time.exchange * each)
        for name, rate in sources.items():
            lines[name].append(rows / rate * each)
        total.append(time.each() * each)
    whole = jobs[0].nodes != jobs[-1].nodes
    for name, seconds in lines.items():
        if not (whole and name in ("PCIe", "disk")):
            color, stroke = _LOOKS[name]
            axes.loglog(keys, seconds, color=color, ls=stroke, lw=1.6, label=name)
    axes.loglog(keys, total, color=_INK, lw=4, alpha=0.18, label="all together")
