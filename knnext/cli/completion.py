"""``knnext --print-completion bash``: the script by which a shell completes our commands.

It is written by shtab out of the parser itself. What is printed needs neither Python nor torch when
it completes.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")
#: Arguments that are places: a folder, or a file or folder. Others that are show it in their name.
_PLACES = {"datastore": "folder", "model": "any", "corpus": "any", "tokenizer": "any"}


class PrintCompletion(argparse.Action):
    """Prints the script and ends, as ``--help`` does."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        from knnext.errors import missing_package

        try:
            import shtab
        except ImportError:
            error = missing_package("shell completion needs", "shtab", "completion")
            parser.exit(1, f"{parser.prog}: {error}\n")
        prepare(parser, {"folder": shtab.DIRECTORY, "any": shtab.FILE})
        parser._print_message(f"{shtab.complete(parser, shell=str(values))}\n", sys.stdout)
        parser.exit()


def prepare(parser: argparse.ArgumentParser, how: dict[str, Any]) -> None:
    """Say of each argument of the parser, and of its commands, what it is completed by."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                prepare(command, how)
        elif kind := place_of(action):
            action.complete = how[kind]  # type: ignore[attr-defined]
        elif action.dest == "name" and not action.option_strings:
            from knnext.experiments.catalog import NAMES

            action.choices = ("list", "all", "report", *NAMES)


def place_of(action: argparse.Action) -> str:
    """``"folder"``, ``"any"`` for what may be a file too, or nothing: it is no place."""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if "FOLDER" in metavar:
        return "folder"
    if "FILE" in metavar or action.dest == "source":
        return "any"
    return _PLACES.get(action.dest, "")
