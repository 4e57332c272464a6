"""The command line of ``knnext``: which commands and options there are. Imports nothing heavy."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any, NoReturn

from knnext import __version__
from knnext.cli import lm_commands as lm
from knnext.cli import store_commands as store
from knnext.cli.completion import SHELLS, PrintCompletion
from knnext.launch import launched


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """An option that a command does not know is that command's error, with its help."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            commands = next(a for a in self._actions if isinstance(a, argparse._SubParsersAction))
            command = commands.choices.get(str(getattr(found, "command", "")), self)
            command.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found

    def _print_message(self, message: str, file: Any = None) -> None:
        with suppress(ValueError):
            if launched()[0]:  # of ranks, whose command lines are one, the first speaks
                return
        super()._print_message(message, file)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="knnext", description="Nearest neighbors for language models: build, search, mix."
    )
    parser.add_argument("--version", action="version", version=f"knnext {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print the script by which this shell completes commands, options and folders",
    )
    # Where no command is chosen yet, these have to be there all the same.
    parser.set_defaults(debug=False, json=False, verbose=0, quiet=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        lm.add_demo_command,
        lm.add_plan_command,
        store.add_build_command,
        store.add_join_command,
        store.add_index_command,
        lm.add_tune_command,
        lm.add_eval_command,
        lm.add_search_command,
        lm.add_generate_command,
        lm.add_explore_command,
        lm.add_serve_command,
        store.add_info_command,
        store.add_import_command,
        store.add_export_command,
        store.add_delete_command,
        store.add_compact_command,
        store.add_distill_command,
        store.add_push_command,
        store.add_pull_command,
        lm.add_experiment_command,
        lm.add_doctor_command,
    ):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
        loudness = command.add_mutually_exclusive_group()
        loudness.add_argument(
            "-v", "--verbose", action="count", default=0, help="show the log; twice: all of it"
        )
        loudness.add_argument(
            "-q", "--quiet", action="store_true", help="no notes, no progress: errors alone"
        )
    return parser
