"""What is said to people: where the lines go, and how text is shown in one."""

from __future__ import annotations

from collections.abc import Callable

#: Takes one line for people.
Say = Callable[[str], None]


def shown(text: str) -> str:
    """One line that a terminal shows as it is: line ends as a sign, no control characters."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "·" for c in text)
