"""The commands push and pull."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knnext.say import Say, binary_size


def push(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.datastore import Datastore

    with Datastore.open(args.datastore) as store:
        done = store.push_to_hub(
            args.repo,
            revision=args.revision,
            private=False if args.public else None,
            commit_message=args.message,
            license=args.license,
            include=args.include,
            verify=not args.no_verify,
        )
    say(f"{done.url}: {done.files:,} files, {binary_size(done.num_bytes)}")
    say(f"commit {done.commit}")
    if done.groups:
        say(f"with it: {', '.join(done.groups)}")
    for note in done.notes:
        say(f"note: {note}")
    return asdict(done)


def pull(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.datastore import Datastore
    from knnext.datastore.meta import META_FILE
    from knnext.progress import Progress

    with Progress(None, "pull", "bytes") as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.done)

        store = Datastore.from_hub(
            args.repo,
            args.datastore,
            revision=args.revision,
            only=args.only,
            shards=args.shards,
            parts=args.parts,
            progress=advance,
        )
    whole = (Path(args.datastore) / META_FILE).is_file()
    say(
        f"{args.datastore}: {store.num_entries:,} rows, {binary_size(bar.done)} fetched and checked"
    )
    if not whole:
        say(
            "note: these are some of its files and no datastore yet; `knnext pull` without --only "
            "fetches the rest, `knnext info` tells what is there"
        )
    return {
        "path": str(store.path),
        "rows": store.num_entries,
        "fetched_bytes": bar.done,
        "whole": whole,
        "fingerprint": store.fingerprint,
    }
