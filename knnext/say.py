"""What is said to people: where the lines go, and how text is shown in one."""

from __future__ import annotations

import codecs
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

#: Takes one line for people.
Say = Callable[[str], None]

#: Above all loggers of the package, which are named as its modules are. Without a handler of the
#: program's own it is silent.
LOGGER = logging.getLogger("knnext")
LOGGER.addHandler(logging.NullHandler())
#: What `KNNEXT_LOG` may be, from the most that is said to the least.
LEVELS = ("debug", "info", "warning", "error")

#: What our own lines hold beyond ASCII, for streams that know no more.
_SPELLED = {
    "−": "-",
    "–": "-",
    "λ": "lmbda",
    "…": "...",
    "·": ".",
    "⏎": "\\n",
    "⇥": "\\t",
    "\u201c": '"',
    "\u201d": '"',
    "\u2018": "'",
    "\u2019": "'",
}


def as_typed(place: object) -> str:
    """A path in a command that people copy: quoted where a shell would take it apart."""
    return shlex.quote(str(place))


def _spell(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: our own signs in ASCII, any other character as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    plain = (_SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in wrong)
    return "".join(plain), error.end


codecs.register_error("knnext", _spell)


def lenient(stream: TextIO) -> TextIO:
    """The stream, set to spell out what its encoding has no sign for instead of raising."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="knnext")
    return stream


def to_log(line: str) -> None:
    """Where lines for people go that nobody takes."""
    LOGGER.info(line)


class _Stderr(logging.Handler):
    """A record in one line, on what stderr is by then; it takes a progress line's place."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            erase = "\r\x1b[K" if sys.stderr.isatty() else ""
            sys.stderr.write(f"{erase}{harmless(self.format(record))}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_STDERR = _Stderr()
_STDERR.setFormatter(
    logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
)


def log_as_told() -> str:
    """Write the log to stderr where `KNNEXT_LOG` says from which level on. Why not, where not."""
    told = os.environ.get("KNNEXT_LOG", "")
    if not told:
        return ""
    if told.lower() not in LEVELS:
        return f"KNNEXT_LOG must be one of {', '.join(LEVELS)}, got {told!r}"
    LOGGER.setLevel(told.upper())
    LOGGER.addHandler(_STDERR)
    return ""


@contextmanager
def log_on_stderr(level: str | None = None) -> Iterator[None]:
    """Within, the log goes to stderr: from ``level`` on, else as told, else what warns."""
    before, there = LOGGER.level, _STDERR in LOGGER.handlers
    if level is not None:
        LOGGER.setLevel(level.upper())
    LOGGER.addHandler(_STDERR)
    try:
        yield
    finally:
        LOGGER.setLevel(before)
        if not there:
            LOGGER.removeHandler(_STDERR)


def binary_size(num_bytes: float) -> str:
    """``"512 B"``, ``"1.50 MiB"``, ``"3.00 GiB"``: powers of 1024."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while num_bytes >= 1023.995 and power < len(units) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:,.{2 if power else 0}f} {units[power]}"


def shown(text: str) -> str:
    """One line that a terminal shows as it is: line ends as a sign, no control characters."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "·" for c in text)


#: What a terminal obeys: controls but tab and line end, and marks that turn the order of letters.
_ORDERS = re.compile("\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Lines that a terminal shows and does not obey: what files and servers say is anybody's."""
    return _ORDERS.sub("·", text)
