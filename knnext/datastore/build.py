"""Builds a datastore from a model and a token stream, and goes on where an earlier run stopped.

A row is a state and the token that followed it; its document is the one in which that token lies.
So the separator that opens a document is a row too, of that document: its state is the last of the
document before (the paper stores its ``</s>`` likewise), and every target of an evaluation over
the same text has exactly one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from knnext.corpus import SplitFacts, TokenizedDocuments, separator_token, window_bos
from knnext.datastore import Datastore
from knnext.datastore.build_job import BuildJob, build_in_parts
from knnext.datastore.errors import DatastoreError
from knnext.datastore.meta import BUILD_FILE, META_FILE
from knnext.datastore.meta_file import read_meta
from knnext.datastore.parts import read_plan
from knnext.datastore.room import check_room, row_bytes
from knnext.lm.batching import choose_batch_size
from knnext.lm.hidden_states import default_block_size, find_key_modules
from knnext.lm.key_layer import capture_hidden_states
from knnext.lm.load import model_identity, model_parts, sha256, tokenizer_hash
from knnext.lm.running import evaluating, trace_inputs
from knnext.lm.windows import build_stride, check_windows

#: Windows at once, where several processes must agree without asking.
_BATCH_SIZE = 8


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
    batch_size: int | None = None,
    corpus: str | SplitFacts | None = None,
    bos_each_window: bool | None = None,
    separate_documents: bool = False,
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
    for (DatastoreFullError), before anything is written. ``resume=False`` refuses any datastore
    that is there. ``corpus`` is ``Corpus.facts(split)``, by which later evaluations find the other
    splits and know the text again; or a description for people. See ``hidden_states`` for the
    windows, which advance by three quarters of their size if ``stride`` does not say (each token is
    then read 1.33 times); what is left out here is as an earlier run of the build had it.
    ``bos_each_window`` begins each with the tokenizer's bos, by default where the tokenizer does so
    by itself. With ``separate_documents`` no state sees another document than its own; the row of a
    document's last state and of the separator that opens the next one is there all the same.

    Several processes build one datastore in ``parts``, cut at batches, so that keys, values and
    documents have the bytes of one process: each takes parts that nobody has taken until none is
    left, and returns when the datastore is joined. ``rank`` (of how many) says with which parts a
    process begins; of more than one, each gets 8 parts if ``parts`` does not say. A folder that was
    begun in parts is gone on with in as many. ``part=(3, 64)`` builds the third of 64 parts alone,
    counted from 1; where it was the last that was missing the datastore is joined and returned,
    else the part.
    """
    _refuse(renamed)
    alone = part is None and parts is None and rank[1] == 1 and read_plan(Path(path)) is None
    grid = settled(model, path, block_size, stride, batch_size, alone=alone)
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
        {**grid, "bos": bos, "separate_documents": separate_documents},
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
            **grid,
            **({} if bos is None else {"bos": bos}),
            **({"separate_documents": True} if separate_documents else {}),
        },
    )
    if alone:
        return job.write(path, "build the datastore", (0, total), job.origin, resume=resume)
    if not resume:
        raise ValueError("resume=False: a build in parts goes on with what other processes began")
    return build_in_parts(job, Path(path), part, parts, rank)


def settled(
    model: nn.Module,
    path: str | Path,
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    *,
    alone: bool = True,
) -> dict[str, int]:
    """The windows of a build with what was not said: as it was begun, else what is usual.

    Processes that share a build (not ``alone``) must have the same windows whatever is free on
    their machines.
    """
    begun = _begun_with(path)
    block = block_size or int(begun.get("block_size", default_block_size(model)))
    same = begun.get("block_size") == block
    usual = {"stride": build_stride(block), "batch_size": _BATCH_SIZE}
    if alone and batch_size is None and not same:
        usual["batch_size"] = choose_batch_size(model, block)
    found = {"stride": stride, "batch_size": batch_size}
    for name, value in found.items():
        if value is None:
            found[name] = int(begun.get(name, usual[name])) if same else usual[name]
    check_windows(block if block_size is None else block_size, int(found["stride"] or 0))
    return {"block_size": block, **{name: int(value or 0) for name, value in found.items()}}


def _begun_with(path: str | Path) -> Mapping[str, Any]:
    """What a build that was begun in the folder, or ended there, says of its windows."""
    for name in (BUILD_FILE, META_FILE):
        try:
            return read_meta(Path(path), name).origin or {}
        except (OSError, DatastoreError):
            continue  # the build itself says what is wrong there
    return {}


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
    width = 0
    for key in find_key_modules(model, key_layer):
        with evaluating(model), capture_hidden_states(model, key) as captured:
            model(**trace_inputs(model))
            width += int(captured.states(1).shape[-1])
    return width


def _vocab_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    return int(size) if size else int(model.get_input_embeddings().weight.shape[0])  # type: ignore
