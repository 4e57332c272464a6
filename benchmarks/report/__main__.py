"""Turns benchmark JSON into benchmarks/README.md and its pictures.

    pytest benchmarks --benchmark-json=benchmarks/out/cpu.json
    python -m benchmarks.report benchmarks/out/cpu.json              # README.md and results/*.png
    python -m benchmarks.report --store cpu-2026-11-29 out/cpu.json  # keep its short form first

Several files may be given: of one shape and implementation the first counts. Rows measured with
KNNEXT_SM90=1 keep a name of their own, so both kernels' runs go into one report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.page import HERE, store, write


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("files", nargs="+", type=Path, help="JSON of --benchmark-json or results/")
    parser.add_argument("--page", type=Path, default=HERE / "README.md")
    parser.add_argument("--pictures", type=Path, default=HERE / "results")
    parser.add_argument(
        "--store", metavar="NAME", help="keep the one file's short form in results/"
    )
    parser.add_argument("--command", default="pytest benchmarks", help="noted with --store")
    given = parser.parse_args(arguments)
    files = given.files
    if given.store and len(files) != 1:
        parser.error("--store takes one file")
    try:
        if given.store:
            files = [store(files[0], given.store, given.command)]
        written = write(files, given.page, given.pictures)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"report: {error}\n")
    print("\n".join(str(path) for path in written))


if __name__ == "__main__":
    main()
