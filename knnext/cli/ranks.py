"""What each process of a command does where torchrun has started several.

Together: all do the command, each with its share of the text, and the first speaks and writes. Led:
the first does it, and the others hold rows of the datastore for its searches. Each: every one does
the command by itself, which divides the work in its own way. Any other is the first one's alone.
"""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Callable
from typing import Any

from knnext.launch import launched

TOGETHER = ("tune", "eval")
LED = ("search", "generate", "experiment")
EACH = ("build", "index", "distill")


def run(
    args: argparse.Namespace,
    work: Callable[[], dict[str, Any]],
    complain: Callable[[Exception], None],
) -> dict[str, Any]:
    """What `work` gives on the first rank, and nothing that anyone is told on the others.

    Raises:
        RankLostError, RankFailedError: another rank has gone, or failed.
    """
    rank, size = launched()
    if size == 1 or args.command in EACH:
        return work()
    if _is_alone(args):
        return work() if rank == 0 else {}
    _end_politely()
    from knnext.cli.session import device_of
    from knnext.ranks import joined

    with joined(device_of(args) if hasattr(args, "device") else "cpu", args.rank_timeout) as ranks:
        if args.command in TOGETHER:
            args.ranks = ranks
            return work()
        from knnext.index.sharded_crew import leading, serve

        if rank:
            serve(ranks, complain)
            return {}
        with leading(ranks):
            return work()


def _is_alone(args: argparse.Namespace) -> bool:
    if args.command == "experiment":
        return args.name in ("list", "report")
    return args.command not in TOGETHER + LED or bool(getattr(args, "scores", None))


def _end_politely() -> None:
    """torchrun ends the ranks that are left by SIGTERM: as an interrupt does, with one sentence."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
