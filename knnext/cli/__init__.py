"""The command ``knnext``: runs one subcommand and turns its end into an exit code.

0: done. 1: the work failed, with one line on stderr that says why. 2: the command line was wrong.
130: interrupted. 141: whoever read stdout has gone, as `head` does. With ``--json`` stdout holds
one JSON object and nothing else; what is said to people then goes to stderr. With ``--verbose``
the log is there, too; with ``--quiet`` errors alone are. Models, corpora and
indexes are imported by the subcommands, which are themselves imported when they are chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from knnext.cli import streams
from knnext.cli.memory import is_out_of_memory, out_of_memory
from knnext.cli.parser import build_parser
from knnext.cli.ranks import run as run_on_ranks
from knnext.errors import KnnextError, missing_package
from knnext.launch import launched
from knnext.say import harmless, log_on_stderr

_EXTRAS = {
    **dict.fromkeys(
        ("transformers", "tokenizers", "datasets", "matplotlib", "pyarrow", "scipy"), "lm"
    ),
    "faiss": "faiss",
    "huggingface_hub": "hub",
    **dict.fromkeys(("starlette", "uvicorn"), "explore"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default) and return the exit code."""
    streams.prepare()
    try:
        code = _code(argv)
        streams.write(sys.stdout, "")
    except BrokenPipeError:
        streams.let_go()
        return 141
    except streams.StreamError as error:
        streams.let_go()
        with contextlib.suppress(OSError):
            print(f"knnext: {error}", file=sys.stderr)
        return 1
    return code


def _code(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse's way out: 0 after --help, 2 after an error
        return int(stop.code or 0)
    try:
        return _run(args)
    except KeyboardInterrupt:
        streams.write(sys.stderr, f"knnext {args.command}: interrupted\n")
        return 130
    except (BrokenPipeError, streams.StreamError):
        raise
    except Exception as error:
        _complain(args, error)
        return 1


def _complain(args: argparse.Namespace, error: Exception) -> None:
    """Say what went wrong: in one line, or with --debug where."""
    try:
        rank, size = launched()
    except ValueError:  # which is the error
        rank, size = 0, 1
    who = f", rank {rank} of {size}" if size > 1 else ""
    line = f"knnext {args.command}{who}: {_one_line(error)}\n"
    text = "".join(traceback.format_exception(error)) if args.debug else line
    streams.write(sys.stderr, harmless(text))


def _run(args: argparse.Namespace) -> int:
    if not args.debug:
        warnings.showwarning = _note
        # Set before transformers is imported: it reads them once.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if args.quiet:
        warnings.simplefilter("ignore")
    module, function = args.run.split(":")
    run = getattr(importlib.import_module(module), function)

    first = launched()[0] == 0  # of ranks, the one that speaks

    def say(line: str = "") -> None:
        if first:
            streams.write(sys.stderr if args.json else sys.stdout, f"{harmless(line)}\n")

    with log_on_stderr(_log_level(args)):
        result = run_on_ranks(args, lambda: run(args, say), lambda error: _complain(args, error))
    if args.json and first:
        text = json.dumps(plain(result), allow_nan=False, ensure_ascii=True)
        streams.write(sys.stdout, f"{text}\n")
    # What a command found may be a failure in itself, as of a check.
    return int(result.get("exit_code", 0)) if isinstance(result, dict) else 0


def _log_level(args: argparse.Namespace) -> str | None:
    if args.quiet:
        return "error"
    return (None, "info", "debug")[min(args.verbose, 2)]


def plain(value: Any) -> Any:
    """The value as JSON can hold it: None for what is not finite, text for unknown types."""
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _one_line(error: Exception) -> str:
    """What went wrong and, where that alone tells little, what kind of error it was."""
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is not None:
            return str(missing_package("this needs", str(error.name), extra))
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return out_of_memory(text)
    if isinstance(error, KnnextError | ValueError | OSError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings meant for people, in one line; those for programmers only with --debug."""
    if not issubclass(category, DeprecationWarning | FutureWarning | ImportWarning):
        streams.write(sys.stderr, f"knnext: note: {harmless(' '.join(str(message).split()))}\n")
