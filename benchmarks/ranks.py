"""What searching over ranks costs, and that it needs the memory it says: `ShardedIndex` measured.

    python benchmarks/ranks.py scaling   # one process against two: overheads; traffic, by formula
    python benchmarks/ranks.py large --rows 100000000 --limit 4GiB --folder /tmp/large

Ranks are processes of this machine with one thread each, over gloo on its loopback: on few cores
the times show what dividing adds, not what more machines would bring. `large` writes a datastore
of 256 bytes a row, searches it by two ranks under a memory limit each (a cgroup, which counts the
page cache too: Linux, root), and deletes it. Each prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from knnext.cli.arguments import num_bytes
from knnext.datastore import Datastore
from knnext.datastore.meta import ShardMeta, shard_names
from knnext.datastore.meta_file import to_json
from knnext.index import ShardedIndex
from knnext.index.sharded_rounds import NEIGHBOR_BYTES
from knnext.ranks import joined

DIM, CHUNK = 128, 1 << 20
CGROUPS = Path("/sys/fs/cgroup/memory")


def write_store(path: Path, rows: int) -> Datastore:
    """Random rows; past the first million the files of these again, since none are read twice."""
    base = torch.randn(min(rows, CHUNK), DIM, generator=torch.Generator().manual_seed(0)).half()
    values = torch.arange(len(base), dtype=torch.int32) % 50_000
    options = {"vocab_size": 50_000, "key_layer": "att", "entries_per_shard": CHUNK}
    with Datastore.create(path, DIM, **options) as store:
        store.append(base, values)
    copies = -(-rows // CHUNK)
    [first], shards = store.meta.shards, []
    for number in range(copies):
        files = []
        for file, name in zip((first.keys, first.values), shard_names(number), strict=True):
            if number:
                shutil.copyfile(path / file.file, path / name)
            files.append(replace(file, file=name))
        shards.append(ShardMeta(first.rows, *files))
    whole = replace(store.meta, num_entries=copies * first.rows, shards=tuple(shards))
    (path / "meta.json").write_bytes(to_json(whole))
    return Datastore.open(path)


def work(args: argparse.Namespace) -> None:
    """What each rank does: its share of the queries, `--repeats` times."""
    torch.set_num_threads(1)
    store = Datastore.open(args.folder)
    with joined(timeout=3600.0) as ranks:
        index = ShardedIndex(store, ranks, resident_bytes=args.resident)
        share = args.queries // ranks.size
        planted = (torch.arange(share) * ranks.size + ranks.rank) * (len(store) // args.queries)
        queries = store.keys[planted]
        index.search(queries[:1], args.k)  # connects, and keeps what stays in memory
        sent, seconds, spent = ranks.sent, [], time.process_time_ns()
        for _ in range(args.repeats):
            ranks.gather([0])
            start = time.perf_counter()
            distances, indices = index.search(queries, args.k)
            ranks.gather([0])
            seconds.append(time.perf_counter() - start)
        spent = sum(one for (one,) in ranks.gather([time.process_time_ns() - spent]))
        # What was written again is as near: the copies in their order, of whichever rank they are.
        copies = torch.arange(min(args.k, -(-len(store) // CHUNK)))
        assert torch.equal(indices[:, : len(copies)], planted[:, None] % CHUNK + copies * CHUNK)
        assert not distances[:, : len(copies)].any()
        others = ranks.size - 1
        formula = (
            share * DIM * 2 * others + others * share * min(args.k, len(store)) * NEIGHBOR_BYTES
        )
        status = Path("/proc/self/status").read_text().splitlines()
        anonymous = [line for line in status if line.startswith("RssAnon")]
        found = {
            "ranks": ranks.size,
            "seconds": min(seconds),
            "processor_seconds": spent / args.repeats / 1e9,
            "sent": (ranks.sent - sent) // args.repeats,
            "formula": formula,
            "anonymous_kib": int(anonymous[0].split()[1]) if anonymous else None,
        }
        if ranks.rank == 0:
            print(json.dumps(found), flush=True)


def run_ranks(size: int, words: list[str], limit: int | None = None) -> dict[str, Any]:
    """Start `work` in so many processes; with a limit, each in a cgroup of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    groups = [CGROUPS / f"knnext-{os.getpid()}-{rank}" for rank in range(size)]
    begun = []
    try:
        for rank, group in enumerate(groups):
            start = [sys.executable, __file__, "work", *words]
            if limit is not None:
                group.mkdir()
                (group / "memory.limit_in_bytes").write_text(str(limit))
                enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
                start = ["sh", "-c", enter, "sh", *start]
            env = {**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
            begun.append(subprocess.Popen(start, env=env, stdout=subprocess.PIPE, text=True))
        said = [process.communicate()[0] for process in begun]
        codes = [process.returncode for process in begun]
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        found: dict[str, Any] = json.loads(said[0])
        if limit is not None:
            peaks = [(group / "memory.max_usage_in_bytes").read_text() for group in groups]
            found |= {"limit": limit, "peaks": [int(peak) for peak in peaks]}
        return found
    finally:
        for process in begun:
            process.kill()
            process.wait()
        for group in groups:
            if limit is not None and group.exists():
                group.rmdir()


def scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Against one process: strong (the same rows, ideally 0.5), weak (as many each, ideally 1).

    Of the processor time of all ranks together the ideals are 1 and 2.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole, twice = Path(folder, "whole"), Path(folder, "twice")
        write_store(whole, args.rows)
        write_store(twice, 2 * args.rows)
        options = ["--queries", str(args.queries), "--k", str(args.k), "--repeats", "5"]

        def run(size: int, path: Path) -> dict[str, Any]:
            return run_ranks(size, ["--folder", str(path), *options])

        rounds = [(run(1, whole), run(2, whole), run(2, twice)) for _ in range(args.rounds)]
    one, strong, weak = zip(*rounds, strict=True)

    def ratio(runs: Any, name: str) -> float:
        return min(run[name] for run in runs) / min(run[name] for run in one)

    return {
        "rows": args.rows,
        "queries": args.queries,
        "k": args.k,
        "strong": ratio(strong, "seconds"),
        "strong_processor": ratio(strong, "processor_seconds"),
        "weak": ratio(weak, "seconds"),
        "weak_processor": ratio(weak, "processor_seconds"),
        "sent_by_formula": strong[0]["sent"] / strong[0]["formula"],
    }


def large(args: argparse.Namespace) -> dict[str, Any]:
    folder = Path(args.folder) / "store"
    try:
        start = time.perf_counter()
        write_store(folder, args.rows)
        print(f"written in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        words = ["--folder", str(folder), "--queries", str(args.queries), "--k", str(args.k)]
        start = time.perf_counter()
        found = run_ranks(2, [*words, "--repeats", "1", "--resident", "0"], args.limit)
        return {
            "rows": args.rows,
            "GB": args.rows * DIM * 2 / 1e9,
            **found,
            "all_seconds": time.perf_counter() - start,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("scaling", "large", "work"))
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--resident", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=num_bytes, default=4 << 30)
    parser.add_argument("--folder", default=".")
    args = parser.parse_args()
    if args.what == "work":
        work(args)
    else:
        print(json.dumps((scaling if args.what == "scaling" else large)(args)))


if __name__ == "__main__":
    main()
