"""Tokens as text while they come: whole characters, names of tokens, and where a text stops."""

from __future__ import annotations

from typing import Any

from knnext.evaluation.prompt import DECODED_BEFORE, decoded, is_broken

_NUMBERED = "<token "


class Speller:
    """The text that each new token adds to what stands before it, as `pieces` has it.

    Args:
        tokenizer: of the model.
        ids: what stands before; not given back.
    """

    def __init__(self, tokenizer: Any, ids: list[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list(ids)
        self._done = len(ids)
        self._start = max(0, self._done - DECODED_BEFORE)

    def add(self, token: int) -> str:
        """Nothing where the token only begins a character."""
        self._ids.append(token)
        now = decoded(self._tokenizer, self._ids[self._start :])
        return "" if is_broken(now) else self._taken(now)

    def rest(self) -> str:
        """At the end: what was begun and not completed."""
        if self._done == len(self._ids):
            return ""
        return self._taken(decoded(self._tokenizer, self._ids[self._start :]))

    def _taken(self, now: str) -> str:
        before = decoded(self._tokenizer, self._ids[self._start : self._done])
        self._start = max(self._start, self._done - DECODED_BEFORE)
        self._done = len(self._ids)
        return now[len(before) :]


class Stops:
    """Cuts a text that comes in parts before the one of some strings that is whole first.

    So it makes no difference in what parts the text comes.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings, self._held = strings, ""
        #: Whether one of them came: the text is over.
        self.met = False

    def add(self, text: str) -> str:
        """What surely belongs to the text; what may begin one of the strings is held back."""
        self._held += text
        found = [(at + len(s), at) for s in self._strings if (at := self._held.find(s)) >= 0]
        if found:
            self.met = True
            return self._out(min(found)[1])
        return self._out(len(self._held) - self._begun())

    def rest(self) -> str:
        """At the end: what was held back, where the text was not stopped."""
        return "" if self.met else self._out(len(self._held))

    def _begun(self) -> int:
        """Characters at the end that are the beginning of one of the strings."""
        longest = max((len(s) for s in self._strings), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-count:]) for s in self._strings):
                return count
        return 0

    def _out(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out


class Names:
    """What tokens are called where they stand alone, in tables of log p.

    The text that a token has within a word, special tokens spelled out; of one that is no whole
    character, or nothing, its number: ``<token 166>``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._anchor = list(ids[-1:])
        self._before = decoded(tokenizer, self._anchor, special=True)

    def __getitem__(self, token: int) -> str:
        name = self._known.get(token)
        if name is None:
            name = self._known[token] = self._name(token)
        return name

    def _name(self, token: int) -> str:
        text = decoded(self._tokenizer, [*self._anchor, token], special=True)
        text = text.removeprefix(self._before)
        return text if text and not is_broken(text) else f"{_NUMBERED}{token}>"


def is_numbered(name: str) -> bool:
    """Whether a token has no text of its own, but this name."""
    return name.startswith(_NUMBERED)
