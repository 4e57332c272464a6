"""Builds a datastore from a model and a token stream, and goes on where an earlier run stopped.

A row is a state and the token that followed it; its document is the one in which that token lies.
So the separator that opens a document is a row too, of that document: its state is the last of the
document before (the paper stores its ``</s>`` likewise), and every target of an evaluation over
the same text has exactly one row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from knnext.corpus import SplitFacts, TokenizedDocuments, separator_token, window_bos
from knnext.datastore import Datastore
from knnext.datastore.build_job import BuildJob, build_in_parts
from knnext.datastore.parts import read_plan
from knnext.datastore.room import check_room, row_bytes
from knnext.lm.hidden_states import default_block_size, find_key_module
from knnext.lm.key_layer import capture_hidden_states
from knnext.lm.load import model_identity, model_parts, sha256, tokenizer_hash
from knnext.lm.running import evaluating, trace_inputs


def build_datastore(
    model: nn.Module,
    tokenizer: Any,
    tokenized: TokenizedDocuments,
    path: str | Path,
    *,
    key_layer: str = "att",
    metric: str = "l2",
    key_dtype: torch.dtype = torch.float16,
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    corpus: str | SplitFacts | None = None,
    bos_each_window: bool | None = None,
    part: tuple[int, int] | None = None,
    parts: int | None = None,
    rank: tuple[int, int] = (0, 1),
    resume: bool = True,
    **renamed: Any,
) -> Datastore:
    """The finished datastore of ``len(tokenized) - 1`` rows at ``path``, opened for reading.

    Where ``path`` holds the beginning of this very build, it is continued, and the result has the
    same bytes as an unbroken one; a finished one is opened as it is. Model, revision, tokenizer,
    text, windows and batches are written into the datastore, and a build that differs in any of
    them is refused by name (IncompatibleDatastoreError); so is one that the disk has not the room
    for (DatastoreWriteError), before anything is written. ``resume=False`` refuses any datastore
    that is there. ``corpus`` is ``Corpus.facts(split)``, by which later evaluations find the other
    splits and know the text again; or a description for people. See ``hidden_states`` for the
    windows; ``bos_each_window`` begins each with the tokenizer's bos, by default where the
    tokenizer does so by itself.

    Several processes build one datastore in ``parts``, cut at batches, so that keys, values and
    documents have the bytes of one process: each takes parts that nobody has taken until none is
    left, and returns when the datastore is joined. ``rank`` (of how many) says with which parts a
    process begins; of more than one, each gets 8 parts if ``parts`` does not say. A folder that was
    begun in parts is gone on with in as many. ``part=(3, 64)`` builds the third of 64 parts alone,
    counted from 1; where it was the last that was missing the datastore is joined and returned,
    else the part.
    """
    _refuse(renamed)
    block = default_block_size(model) if block_size is None else block_size
    step = max(1, block // 2) if stride is None else stride
    total = max(0, len(tokenized) - 1)
    bos = bos_of(tokenizer, bos_each_window)
    facts = corpus if isinstance(corpus, SplitFacts) else None
    name = corpus.corpus if isinstance(corpus, SplitFacts) else corpus
    width = key_width(model, key_layer)
    check_room(path, total, row_bytes(width, key_dtype))
    model_id, revision = model_identity(model)
    job = BuildJob(
        model,
        tokenized,
        {"block_size": block, "stride": step, "batch_size": batch_size, "bos": bos},
        width,
        key_dtype,
        {
            "metric": metric,
            "key_layer": key_layer,
            "model_id": model_id,
            "model_revision": revision,
            "model": model_parts(model),
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "vocab_size": _vocab_size(model),
            "corpus": name,
            "text": None if facts is None else facts.to_dict(),
        },
        {
            "tokens": sha256(tokenized.tokens.tobytes()),
            "block_size": block,
            "stride": step,
            "batch_size": batch_size,
            **({} if bos is None else {"bos": bos}),
        },
    )
    alone = part is None and parts is None and rank[1] == 1
    if alone and read_plan(Path(path)) is None:
        return job.write(path, "build the datastore", (0, total), job.origin, resume=resume)
    if not resume:
        raise ValueError("resume=False: a build in parts goes on with what other processes began")
    return build_in_parts(job, Path(path), part, parts, rank)


def _refuse(renamed: dict[str, Any]) -> None:
    """TypeError for keywords that there are none of; it tells what an old one is called now."""
    for name in renamed:
        hint = "; the keys' dtype is key_dtype, the model's is its own" if name == "dtype" else ""
        raise TypeError(f"build_datastore() has no argument {name!r}{hint}")


def bos_of(tokenizer: Any, each_window: bool | None) -> int | None:
    """The token that windows begin with, or None; ``each_window`` None: as the tokenizer does."""
    if each_window is None:
        return window_bos(tokenizer)
    return separator_token(tokenizer) if each_window else None


def key_width(model: nn.Module, key_layer: str) -> int:
    """The width of a key; a short pass of the model tells it."""
    key = find_key_module(model, key_layer)
    with evaluating(model), capture_hidden_states(model, key) as captured:
        model(**trace_inputs(model))
        return int(captured.states(1).shape[-1])


def _vocab_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    return int(size) if size else int(model.get_input_embeddings().weight.shape[0])  # type: ignore
