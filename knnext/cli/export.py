"""The command export."""

from __future__ import annotations

import argparse
from typing import Any

from knnext.say import Say, binary_size


def export(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.datastore import Datastore
    from knnext.datastore.export import export_rows
    from knnext.progress import Progress

    with Datastore.open(args.datastore) as store, Progress(len(store), "export", "rows") as bar:
        files = export_rows(
            store, args.out, args.format, progress=lambda done, _: bar.update(done - bar.done)
        )
        size = sum(file.stat().st_size for file in files)
        say(f"{args.out}: {len(store):,} rows in {len(files)} files, {binary_size(size)}")
        return {"out": str(args.out), "rows": len(store), "files": [f.name for f in files]}
