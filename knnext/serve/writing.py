"""One text that is being written: its tokens, what of it has been told, and when it is over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from knnext.evaluation.prompt import pieces
from knnext.serve.asked import Asked, Prompt
from knnext.serve.sampling import generator_of
from knnext.serve.speller import Names, Speller, Stops


@dataclass(frozen=True)
class Scored:
    """A token and what was thought of it.

    Attributes:
        offset: where its text begins in the text that is given back.
        log_p: by the mixture; None for a prompt's first token, before which nothing stands.
        share: the neighbors' part of p.
        top: (token, log p) of the likeliest and of this one, likeliest first.
    """

    token: int
    name: str
    offset: int
    log_p: float | None = None
    share: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a text has grown by: whole characters, and the tokens that begin in them.

    Attributes:
        number: of the text among those of its request.
        finish: "stop" or "length" with the last piece of a text, else None.
    """

    number: int
    text: str
    tokens: tuple[Scored, ...] = ()
    finish: str | None = None
    num_new: int = 0


@dataclass(eq=False)
class Text:
    """A prompt and what is written after it.

    Args:
        number: among the texts of the request.
        copy: among the continuations of one prompt, which have generators of their own.
        tell: is given each `Piece`.
    """

    asked: Asked
    prompt: Prompt
    number: int
    copy: int
    tokenizer: Any
    names: Names
    ends: frozenset[int]
    tell: Callable[[Piece], None]
    ids: list[int] = field(init=False)
    finished: bool = False

    def __post_init__(self) -> None:
        self.ids = list(self.prompt.ids)
        draws = self.asked.temperature > 0
        self.generator = generator_of(self.asked.seed, self.copy) if draws else None
        self._speller = Speller(self.tokenizer, self.ids)
        self._stops = Stops(self.asked.stop)
        self._told = self._spelled = 0
        self._scored: list[Scored] = []

    @property
    def reads_whole(self) -> bool:
        """Whether log p of the prompt's own tokens is asked for."""
        return self.asked.echo and self.asked.top is not None

    @property
    def num_new(self) -> int:
        return len(self.ids) - len(self.prompt.ids)

    @property
    def is_full(self) -> bool:
        """Whether it has as many new tokens as were asked for, or as fit."""
        context = self.asked.context
        return self.num_new >= self.asked.max_tokens or len(self.ids) == context

    def begin(self, log_ps: list[float], shares: list[float], tops: list[Any]) -> None:
        """The prompt has been read; log p, shares and likeliest tokens of all but its first."""
        if self.asked.echo:
            text = self.prompt.text
            parts = pieces(self.tokenizer, self.ids, 0) if self.reads_whole or text is None else []
            if self.reads_whole:
                self._score_prompt(parts, log_ps, shares, tops)
            self._told = self._spelled = len("".join(parts) if text is None else text)
            scored, self._scored = tuple(self._scored), []
            self.tell(Piece(self.number, "".join(parts) if text is None else text, scored))
        if self.is_full:
            self._end("length")

    def _score_prompt(
        self, parts: list[str], log_ps: list[float], shares: list[float], tops: list[Any]
    ) -> None:
        offset = 0
        for place, (token, part) in enumerate(zip(self.ids, parts, strict=True)):
            name = self.names[token]
            if place == 0:
                self._scored.append(Scored(token, name, offset))
            else:
                top = self._named(tops[place - 1])
                found = Scored(token, name, offset, log_ps[place - 1], shares[place - 1], top)
                self._scored.append(found)
            offset += len(part)

    def add(self, token: int, log_p: float, share: float, top: Any) -> None:
        """The next token was chosen."""
        self.ids.append(token)
        if self.asked.top is not None:
            name = self.names[token]
            found = Scored(token, name, self._spelled, log_p, share, self._named(top))
            self._scored.append(found)
        ends = token in self.ends
        full = self.is_full
        new = self._speller.add(token)
        if ends or full:
            new += self._speller.rest()
        self._spelled += len(new)
        out = self._stops.add(new)
        if self._stops.met or ends:
            self._end("stop", out)
        elif full:
            self._end("length", out)
        else:
            self._tell(out, None)

    def _named(self, top: Any) -> tuple[tuple[int, str, float], ...]:
        return tuple((token, self.names[token], log_p) for token, log_p in top)

    def _end(self, finish: str, out: str = "") -> None:
        self.finished = True
        self._tell(out + self._stops.rest(), finish)

    def _tell(self, out: str, finish: str | None) -> None:
        self._told += len(out)
        if not out and finish is None:
            return
        # Of a text that was stopped, tokens after its end are not told.
        whole = finish is not None and not self._stops.met
        ready = [one for one in self._scored if whole or one.offset < self._told]
        self._scored = self._scored[len(ready) :]
        self.tell(Piece(self.number, out, tuple(ready), finish, self.num_new))
