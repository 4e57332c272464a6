"""``python -m knnext.planning docs`` writes the table and the figure of docs/scale.md;
``python -m knnext.planning seen DATASTORE`` compares a plan with what happens on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

import knnext.planning.scale as scale


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m knnext.planning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    docs = commands.add_parser("docs", help="rewrite the tables and the figure")
    docs.add_argument("folder", nargs="?", type=Path, default=Path("docs"))
    seen = commands.add_parser("seen", help="a plan against a small build, encode and search")
    seen.add_argument("datastore")
    seen.add_argument("--model")
    seen.add_argument("--disk", default=".", metavar="FOLDER", help="where to work")
    args = parser.parse_args()
    if args.command == "docs":
        scale.write(args.folder)
        return
    from knnext.planning.seen import seen as run

    run(args.datastore, args.model, lambda line: print(line, flush=True), folder=args.disk)


if __name__ == "__main__":
    main()
