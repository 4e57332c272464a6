"""The command distill."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from knnext.cli.session import Settings, check_model, open_datastore, open_index, open_model
from knnext.cli.text import text_to_score
from knnext.launch import launched
from knnext.say import Say, binary_size


def distill(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.datastore.build import bos_of
    from knnext.distill import distill
    from knnext.distill.sparse import pyarrow
    from knnext.progress import Progress

    pyarrow()  # before the model is read
    store = open_datastore(args)
    settings = Settings.of(args)
    if settings.temperature is None:
        raise ValueError(
            "no temperature: run `knnext tune` on this datastore first, or give --temperature"
        )
    model, tokenizer = open_model(args, store)
    check_model(store, model, tokenizer)
    # Which of its own documents are left out is told by --exclude, and not by how it is divided.
    text, _ = text_to_score(args, tokenizer, store, say)
    say(f"{args.split}: {len(text) - 1:,} tokens of {text.num_documents:,} documents")
    windows = {n: getattr(args, n) for n in ("block_size", "stride", "batch_size")}
    if args.separate_documents is not None:
        windows["separate_documents"] = args.separate_documents
    if args.bos_each_window is not None:
        windows["bos"] = bos_of(tokenizer, args.bos_each_window)
    with Progress(None, "distill", "tokens") as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.done)

        done = distill(
            model,
            open_index(args, store, settings, say),
            text,
            args.out,
            temperature=settings.temperature,
            k=settings.k,
            top=args.top,
            exclude=args.exclude,
            allow_overlap=args.allow_overlap,
            shard_tokens=args.shard_tokens,
            progress=advance,
            full_last_window=args.full_last_window,
            rank=launched(),
            say=say,
            **windows,
        )
    say(
        f"{args.out}: {done.tokens:,} tokens in {done.shards:,} files, "
        f"{binary_size(done.num_bytes)}, {done.bytes_per_token:.1f} bytes a token"
    )
    if args.exclude != "none":
        say(
            f"left out: its own {args.exclude} of each token, in {done.excluded_documents:,} of "
            f"{text.num_documents:,} documents"
        )
    if done.copies:
        say(
            f"note: the datastore holds further copies of {done.copies:,} of these documents, "
            "which were not left out"
        )
    return {**asdict(done), "bytes_per_token": done.bytes_per_token, "temperature":
            settings.temperature, "k": settings.k}  # fmt: skip
