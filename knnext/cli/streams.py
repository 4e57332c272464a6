"""stdin, stdout and stderr as commands find them: closed, full, of an old encoding, cut short."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO, cast

from knnext.errors import KnnextError
from knnext.say import lenient


class StreamError(KnnextError):
    """stdout takes no more, for a reason other than that its reader has gone."""


def prepare() -> None:
    """Open the null device where a stream is closed, and let no character end a command.

    A closed stream's number would be given to the next file that is opened, and what a library
    prints would end in a datastore.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            # Free numbers are given in order, so that this one is the closed stream's own.
            stream = cast("TextIO", Path(os.devnull).open(mode))  # noqa: SIM115
            setattr(sys, name, stream)
        if mode == "w":
            lenient(stream)


def write(stream: TextIO, text: str) -> None:
    """Write and flush. BrokenPipeError where the reader has gone, StreamError for another end."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        name = "stderr" if stream is sys.stderr else "stdout"
        raise StreamError(f"{name}: {error.strerror or error}") from error


def let_go() -> None:
    """Nothing more goes to stdout: what is flushed at the end of Python must not fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(null, stream.fileno())
    os.close(null)
