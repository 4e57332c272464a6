"""Texts continued by a base LM and by a kNN-LM, side by side, with what moved each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from knnext.evaluation.influence import Influence, influences
from knnext.lm.knnlm import KNNLM
from knnext.lm.running import context_length

if TYPE_CHECKING:
    from knnext.corpus import TokenizedDocuments
    from knnext.index.base import Index

#: Tokens that a document must have for a prompt.
_SHORTEST_PROMPT = 16


@dataclass(frozen=True)
class Continuation:
    """One prompt's, as token ids.

    Attributes:
        document: the name of the document that the prompt is the beginning of.
        prompt: what was read.
        base: what the base LM wrote, each token the likeliest.
        mixed: what the kNN-LM wrote.
        influences: of each token of ``mixed``.
    """

    document: str
    prompt: list[int]
    base: list[int]
    mixed: list[int]
    influences: list[Influence]


def continuations(
    model: Any,
    index: Index,
    tokenizer: Any,
    text: TokenizedDocuments,
    *,
    k: int,
    temperature: float,
    lmbda: float,
    count: int = 10,
    new_tokens: int = 40,
) -> Iterator[Continuation]:
    """Of the first ``count`` documents of ``text`` that are long enough, from where it ends.

    The choice looks at nothing but lengths. Of a document as much is read as leaves room in the
    model's context for ``new_tokens``, its end first. The model's generation_config is as it was
    afterwards.
    """
    mixed = KNNLM(model, index, k, temperature, lmbda)
    limit = context_length(model)
    room = None if limit is None else max(1, limit - new_tokens)
    own = model.generation_config
    model.generation_config = plain_config(model, tokenizer)
    try:
        for number in _long_enough(text, count):
            first, last = text.document_offsets[number : number + 2]
            ids = text.tokens[int(first) : int(last)].tolist()[-(room or len(text.tokens)) :]
            new = continued(mixed, ids, max_new_tokens=new_tokens)
            moved = influences(
                model,
                index,
                index.datastore,
                ids + new,
                len(ids),
                k=k,
                temperature=temperature,
                lmbda=lmbda,
            )
            base = continued(model, ids, max_new_tokens=new_tokens)
            yield Continuation(text.names[number], ids, base, new, moved)
    finally:
        model.generation_config = own


def _long_enough(text: TokenizedDocuments, count: int) -> list[int]:
    lengths = text.document_offsets[1:] - text.document_offsets[:-1]
    return [i for i, length in enumerate(lengths.tolist()) if length >= _SHORTEST_PROMPT][:count]


def continued(model: Any, ids: list[int], seed: int = 0, **options: Any) -> list[int]:
    """The tokens that ``model.generate`` puts behind ``ids``; ``options`` are its arguments."""
    torch.manual_seed(seed)
    given = torch.tensor([ids], dtype=torch.int64, device=model.device)
    output = model.generate(given, attention_mask=torch.ones_like(given), **options)
    new: list[int] = output[0, len(ids) :].tolist()
    return new


def plain_config(model: Any, tokenizer: Any) -> Any:
    """Of what the model's own generation_config says, only its special tokens.

    The rest (a temperature, penalties, tokens forced or suppressed, lengths) would stand between
    the mixture and what is drawn, without having been asked for.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    pad = next((x for x in (own.pad_token_id, tokenizer.pad_token_id, ends[0]) if x is not None), 0)
    return GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=eos, pad_token_id=pad)
