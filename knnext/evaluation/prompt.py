"""A text for a model to read, and the text that it wrote: tokens in, tokens out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knnext.errors import KnnextWarning

if TYPE_CHECKING:
    from knnext.datastore import Datastore

#: What decoders give for bytes that are no whole character.
_BROKEN = "\ufffd"
#: Tokens before a new one that a decoder may need to see: a space belongs to what it stands after.
DECODED_BEFORE = 8


@dataclass(frozen=True)
class Prompt:
    """``ids``: what the model reads. ``given``: the tokens that the whole text has."""

    ids: list[int]
    given: int


def read_prompt(text: str, tokenizer: Any, store: Datastore, most: int | None) -> Prompt:
    """The text's tokens, led by the mark that led every document of the datastore.

    Special tokens spelled out in the text are text, as they are in a corpus. Past ``most`` tokens
    the head is left out, with a warning; where the datastore's windows begin with bos, so does
    what is left.
    """
    from knnext.corpus import separator_token

    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    whole = [separator_token(tokenizer), *ids["input_ids"]]
    if most is None or len(whole) <= most:
        return Prompt(whole, len(whole))
    bos = (store.meta.origin or {}).get("bos")
    head = [] if bos is None or most < 2 else [int(bos)]
    warnings.warn(
        f"the text has {len(whole)} tokens, of which the last {most - len(head)} are read",
        KnnextWarning,
        stacklevel=2,
    )
    return Prompt([*head, *whole[len(whole) - most + len(head) :]], len(whole))


def pieces(tokenizer: Any, ids: list[int], first: int) -> list[str]:
    """The text that each token from ``first`` on adds to what stands before it.

    Decoders drop a space at the beginning, and a character may be spread over tokens, so no token
    is decoded alone. A character belongs to the token that completes it; the tokens before it add
    nothing. Special tokens add nothing.
    """
    found: list[str] = []
    start, done = max(0, first - DECODED_BEFORE), first
    for end in range(first + 1, len(ids) + 1):
        before, now = decoded(tokenizer, ids[start:done]), decoded(tokenizer, ids[start:end])
        if is_broken(now) and end < len(ids):
            found.append("")  # the next token may complete it
            continue
        found.append(now[len(before) :])
        start, done = max(start, done - DECODED_BEFORE), end
    return found


def decoded(tokenizer: Any, ids: list[int], *, special: bool = False) -> str:
    """The tokens as text, nothing tidied; special tokens are spelled out only where asked for."""
    text: str = tokenizer.decode(
        ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
    return text


def is_broken(text: str) -> bool:
    """Whether the text ends in what may be a character that is not complete."""
    return text.endswith(_BROKEN)
