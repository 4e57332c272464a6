"""Where is a search slower than a rival's? Every exact rival at every shape of a grid, on a CPU.

    python -m benchmarks.grid --out FILE.json            # some minutes; 2 threads unless said
    python -m benchmarks.grid --dtype float32 --queries 1 16 --k 1 1024

All stand ready as in use: indexes are built, the norms of knnext's keys given. At each shape all
run in turns, round by round; a figure is the median, over the rounds, of a rival's seconds over
knnext's in the same round. A rival whose first call takes 20 times as long as knnext's has that
call alone. `knnext_codes` is the same search by eight-bit codes, not a rival. What each finds is
checked: a recall under 0.999 is an error.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

import knnext._host as host
from benchmarks.bench_knn_search import IMPLEMENTATIONS, LEAST_RECALL
from benchmarks.data.search import Data, make_data, recall
from benchmarks.data.search_shapes import Shape
from benchmarks.timing.measure import versions
from benchmarks.timing.turns import timed

OURS, CODES = "knnext_sqnorms", "knnext_codes"
RIVALS = (
    *("faiss_flat", "faiss_sq_fp16", "svs_flat", "usearch_exact", "scann_brute_force"),
    "torch_chunked",
)
DTYPES = ("float16", "bfloat16", "float32")
ROUNDS, HOPELESS = 5, 20.0
#: Rows of keys, fewer where they would fill more: what is kept for all shapes over them.
ENTRIES, MOST_VALUES = 200_000, 1 << 28


def shapes(args: argparse.Namespace) -> Iterator[Shape]:
    """Shapes over the same keys are neighbors."""
    for name in args.dtype:
        for dim in args.dim:
            entries = min(args.entries, MOST_VALUES // dim)
            for k in args.k:
                for queries in args.queries:
                    yield Shape(queries, entries, dim, k, getattr(torch, name))


def measure(data: Data, names: Sequence[str]) -> dict[str, float]:
    """Seconds of each over knnext's, those that are installed and take this dtype."""
    runs: dict[str, Callable[[], Any]] = {}
    first: dict[str, float] = {}
    for name in (OURS, CODES, *names):
        chosen = IMPLEMENTATIONS[name]
        if not chosen.takes(data.shape, data.device):
            continue
        try:
            run = chosen.prepare(data)
        except pytest.skip.Exception as reason:
            print(f"  {name}: {reason}", flush=True)
            continue
        found = recall(data, run())
        if found < max(LEAST_RECALL, chosen.least_recall):
            raise SystemExit(f"{name} at {data.shape}: recall {found:.4f}")
        runs[name], first[name] = run, timed(run)
    late = {n: s / first[OURS] for n, s in first.items() if s > HOPELESS * first[OURS]}
    turns: dict[str, list[float]] = {name: [] for name in runs if name not in late}
    for _ in range(ROUNDS):
        for name, seconds in turns.items():
            seconds.append(timed(runs[name]))
    return late | {
        name: statistics.median(a / b for a, b in zip(seconds, turns[OURS], strict=True))
        for name, seconds in turns.items()
        if name != OURS
    }


def line(shape: Shape, ratios: dict[str, float]) -> str:
    """The nearest rival first."""
    order = sorted((n for n in ratios if n != CODES), key=ratios.__getitem__)
    said = [f"{name} {ratios[name]:.2f}" for name in (*order, CODES) if name in ratios]
    return f"{shape}: {', '.join(said)}"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grid", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128, 576, 768, 1024, 4096])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 128, 1024])
    parser.add_argument("--dtype", nargs="+", default=["float16"], choices=DTYPES)
    parser.add_argument("--entries", type=int, default=ENTRIES, help="rows of keys at most")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = parse(words)
    torch.set_num_threads(args.threads)
    rows = []
    for shape in shapes(args):
        [data] = make_data(shape, "cpu")
        ratios = measure(data, args.rivals)
        print(line(shape, ratios), flush=True)
        ratios = {name: round(ratio, 3) for name, ratio in ratios.items()}
        rows.append({**shape.facts(), "times_knnext": ratios})
        if args.out:
            facts = {"path": host.best_cpu_isa(), "threads": args.threads, "versions": versions()}
            found = {"date": date.today().isoformat(), **facts, "rows": rows}
            args.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    lost = [row for row in rows if any(r < 1 for n, r in row["times_knnext"].items() if n != CODES)]
    print(f"{len(rows) - len(lost)} of {len(rows)} shapes faster than every exact rival")
    return rows


if __name__ == "__main__":
    main()
