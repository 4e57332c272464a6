"""What is said to people: where the lines go, and how text is shown in one."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import TextIO

#: Takes one line for people.
Say = Callable[[str], None]

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
