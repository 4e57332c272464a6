"""Options of the commands push and pull."""

from __future__ import annotations

import argparse

from knnext.cli.arguments import add_datastore, names, natural

_MOST_NUMBERS = 1_000_000


def add_push_options(c: argparse.ArgumentParser) -> None:
    add_datastore(c)
    c.add_argument("repo", metavar="ORG/NAME", help="dataset repository; made if it is not there")
    c.add_argument("--revision", help="branch, made if it is not there; default: main")
    c.add_argument(
        "--public",
        action="store_true",
        help="the repository may be, or is made, one that everyone can read, and with it the text; "
        "default: private",
    )
    c.add_argument(
        "--license", metavar="ID", help="stated in the card, as cc-by-sa-4.0; with --public: needed"
    )
    c.add_argument("--message", help="of the commit")
    c.add_argument(
        "--include",
        type=names,
        metavar="NAME,NAME",
        help="what lies beside the datastore and goes with it: codes,index,tuning or all; "
        "default: codes and tuning, if they are there",
    )
    c.add_argument(
        "--no-verify", action="store_true", help="do not read every byte first to compare checksums"
    )


def add_pull_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("repo", metavar="ORG/NAME", help="dataset repository")
    add_datastore(c)
    c.add_argument("--revision", help="branch, tag or commit; default: main")
    c.add_argument(
        "--only",
        type=names,
        metavar="NAME,NAME",
        help="of keys,values,documents,codes,index,tuning, or all; default: all but index, which "
        "FAISS reads and trusts",
    )
    some = c.add_mutually_exclusive_group()
    some.add_argument(
        "--shards", type=numbers, metavar="N,N-N", help="these alone, from 0: a smaller datastore"
    )
    some.add_argument(
        "--parts", type=numbers, metavar="N,N-N", help="these alone, from 1, of one made in parts"
    )


def numbers(text: str) -> list[int]:
    """``0-2,5``"""
    found: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        start = natural(first)
        end = natural(last) if dash else start
        if not start <= end < start + _MOST_NUMBERS:
            raise argparse.ArgumentTypeError(f"wanted are numbers, as 0-2,5, got {text!r}")
        found += range(start, end + 1)
    return found
