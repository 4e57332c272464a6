"""The commands delete and compact, and the documents that searches are told of by name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.say import Say, as_typed

if TYPE_CHECKING:
    from knnext.index import Filter


def delete(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.datastore import Datastore
    from knnext.evaluation.tuning_file import tuning_path

    store = Datastore.open(args.datastore)
    rows = store.delete(names_of(args.documents))
    held = (
        "; no search finds them from now on. The files hold them until "
        f"`knnext compact {as_typed(args.datastore)}`"
    )
    say(f"{args.datastore}: {rows:,} rows deleted, {len(store):,} left{held if rows else ''}")
    tuned = tuning_path(args.datastore)
    if rows and tuned.exists():
        say(f"{tuned} was fitted with them: `knnext tune` fits temperature and lmbda anew")
    return {"rows": rows, "left": len(store), "fingerprint": store.fingerprint}


def compact(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.index.compact import compact as run
    from knnext.progress import Progress

    with Progress(None, "compact", "rows") as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.done)

        found = run(args.datastore, rebuild=not args.drop_index, progress=advance)
    say(f"{args.datastore}: {found.rows:,} rows are gone, {found.left:,} left")
    for line in found.beside:
        say(line)
    return {"rows": found.rows, "left": found.left, "beside": list(found.beside)}


def filter_of(args: argparse.Namespace) -> Filter | None:
    """What --include-documents and --exclude-documents leave of a datastore, if they are given."""
    included = getattr(args, "include_documents", None)
    excluded = getattr(args, "exclude_documents", None)
    if included is None and excluded is None:
        return None
    from knnext.index import Filter

    return Filter(
        documents=None if included is None else names_of(included),
        exclude_documents=None if excluded is None else names_of(excluded),
    )


def names_of(given: list[list[str]]) -> list[str]:
    """Names as they are, and those in the files of an @: one a line, empty ones left out."""
    found: list[str] = []
    for one in (one for some in given for one in some):
        if not one.startswith("@"):
            found.append(one)
            continue
        # Not splitlines: names may hold what ends a line elsewhere, such as U+2028.
        lines = Path(one[1:]).read_text(encoding="utf-8-sig").split("\n")
        found += [line for line in lines if line.strip()]
    return found
