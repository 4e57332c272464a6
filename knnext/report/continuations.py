"""The report's section of continuations: what the base LM wrote, what the kNN-LM did, and why."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from knnext.evaluation.prompt import pieces
from knnext.evaluation.spans import Span, decode_all, neighbor_spans

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.evaluation.continuation import Continuation

#: Tokens of a prompt that are shown, from its end.
_SHOWN = 60
#: Lines of it.
_LINES = 8
#: What cannot be seen, as the explorer shows it.
_SIGNS = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "␣"})
_SECTION = """<section aria-labelledby="continued-title">
<h2 id="continued-title">Test documents, continued</h2>
<p>{lead}</p>
{parts}
</section>"""


@dataclass(frozen=True)
class Move:
    """A token that the mixture chose in place of the base LM's likeliest.

    ``number``: of the token in the continuation. ``text``, ``instead``: both tokens. ``p_lm``,
    ``p``: of the chosen one, before and after. ``neighbor``: before, token, after and document of
    the nearest row that has it, or None.
    """

    number: int
    text: str
    instead: str
    p_lm: float
    p: float
    neighbor: tuple[str, str, str, str] | None


@dataclass(frozen=True)
class Shown:
    """A continuation in words. ``mixed``: one piece a token, as they join."""

    document: str
    prompt: str
    cut: bool
    base: str
    mixed: Sequence[str]
    moves: Sequence[Move]


def in_words(found: Sequence[Continuation], datastore: Datastore, tokenizer: Any) -> list[Shown]:
    """Continuations for people, with the neighbors' excerpts."""
    shown = []
    for one in found:
        start, end = max(0, len(one.prompt) - _SHOWN), len(one.prompt)
        mixed = pieces(tokenizer, one.prompt + one.mixed, end)
        shown.append(
            Shown(
                one.document,
                "".join(pieces(tokenizer, one.prompt, start)),
                start > 0,
                "".join(pieces(tokenizer, one.prompt + one.base, end)),
                mixed,
                _moves(one, mixed, datastore, tokenizer),
            )
        )
    return shown


def _moves(
    one: Continuation, mixed: Sequence[str], datastore: Datastore, tokenizer: Any
) -> list[Move]:
    moved = [
        (number, why)
        for number, (token, why) in enumerate(zip(one.mixed, one.influences, strict=True))
        if token != why.base_token
    ]
    rows = torch.tensor(
        [why.row for _, why in moved if why.row >= 0], dtype=torch.int64, device="cpu"
    )
    spans = iter(neighbor_spans(datastore, tokenizer, rows))
    instead = decode_all(tokenizer, [[why.base_token] for _, why in moved])
    return [
        Move(
            number,
            mixed[number],
            base,
            why.p_lm,
            why.p,
            _neighbor(next(spans)) if why.row >= 0 else None,
        )
        for (number, why), base in zip(moved, instead, strict=True)
    ]


def _neighbor(span: Span) -> tuple[str, str, str, str]:
    before, after = span.excerpt
    return before, span.token, after, span.document


def continuations_section(found: Sequence[Shown]) -> str:
    """HTML; "" where there is none."""
    if not found:
        return ""
    moves = sum(len(one.moves) for one in found)
    tokens = sum(len(one.mixed) for one in found)
    lead = (
        f"The first {len(found)} documents of the test split that are long enough, whatever comes "
        "of them, continued from where their text ends here; each token is the likeliest. Marked: "
        f"the {moves:,} of {tokens:,} tokens of the kNN-LM that the base LM, in the same place, "
        "would not have chosen."
    )
    return _SECTION.format(lead=lead, parts="\n".join(map(_article, found)))


def _article(one: Shown) -> str:
    moved = {move.number for move in one.moves}
    mixed = "".join(
        f"<mark>{html.escape(piece)}</mark>" if number in moved else html.escape(piece)
        for number, piece in enumerate(one.mixed)
    )
    same = one.base == "".join(one.mixed)
    base = "<i>the same</i>" if same else html.escape(one.base)
    lines = [
        '<article class="continued">',
        f"<h3>{html.escape(one.document)}</h3>",
        f'<p class="written muted">{html.escape(_tail(one))}</p>',
        '<div class="pair">',
        f'<div><h4>base LM</h4><p class="written">{base}</p></div>',
        f'<div><h4>kNN-LM</h4><p class="written">{mixed}</p></div>',
        "</div>",
    ]
    if one.moves:
        count = len(one.moves)
        lines += [
            f"<details><summary>{count} token{'s' if count > 1 else ''} moved</summary>",
            "<ol>",
            *map(_move, one.moves),
            "</ol>",
            "</details>",
        ]
    return "\n".join([*lines, "</article>"])


def _tail(one: Shown) -> str:
    """The end of a prompt, no longer than a glance: a page has no place for a second scroll bar."""
    lines = one.prompt.split("\n")
    cut = one.cut or len(lines) > _LINES
    return ("…" if cut else "") + "\n".join(lines[-_LINES:])


def _chance(p: float) -> str:
    """`0.21`, `1.2·10⁻⁵`: as the explorer says it."""
    if p >= 0.001 or p <= 0:
        return f"{p:.2g}"
    digits, power = f"{p:.1e}".split("e-")
    return f"{digits}·10⁻{str(int(power)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _move(move: Move) -> str:
    chosen, instead = (
        f"<code>{html.escape(text.translate(_SIGNS))}</code>" for text in (move.text, move.instead)
    )
    line = (
        f"<li><mark>{chosen}</mark>, where the base LM has {instead}: "
        f"<i>p</i> {_chance(move.p_lm)} → {_chance(move.p)}"
    )
    if move.neighbor is not None:
        before, token, after, document = map(html.escape, move.neighbor)
        line += (
            f'<br><span class="written">{before}<mark>{token}</mark>{after}</span> '
            f'<span class="muted">{document}</span>'
        )
    return line + "</li>"
