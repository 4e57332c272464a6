"""Datastores that go to the hub in these tests, and what lies in a folder."""

from __future__ import annotations

from pathlib import Path

from knnext.datastore import Datastore
from tests.datastore import small

REPO = "org/store"
ROWS = ("keys", "values", "documents")
FIT = {
    "temperature": 2.0,
    "lmbda": 0.25,
    "k": 8,
    "index": "exact",
    "nprobe": None,
    "rescore": False,
    "perplexity": 9.5,
}


def joined(path: Path) -> Datastore:
    """Of parts of 20, 0 and 20 rows, whose shards have 16 and 4, by the joining of this house."""
    from dataclasses import replace

    from knnext.datastore.meta import BUILD_FILE, PartMeta, part_folder
    from knnext.datastore.meta_file import to_json
    from knnext.datastore.parts import join, part_origin

    rows = (20, 0, 20)
    places = [sum(rows[:n]) for n in range(4)]
    with small.begin(path) as plan:
        parts = tuple(PartMeta(part_folder(n), count) for n, count in enumerate(rows, start=1))
        meta = replace(plan.meta, parts=parts)
        plan._writer.abandon()
        plan._writer = None
    for file in path.iterdir():
        file.unlink()
    for number in range(1, 4):
        first, last = places[number - 1], places[number]
        document = 2 * (number == 3)
        origin = part_origin(meta, number, document)
        with small.begin(path / part_folder(number), origin=origin) as part:
            keys, values, documents = small.rows(first, last)
            part.append(keys, values, documents - document)
    (path / BUILD_FILE).write_bytes(to_json(meta))
    join(path)
    return Datastore.open(path)


def files(folder: Path) -> dict[str, bytes]:
    """By path in the folder, but for locks."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def same_bytes(found: Datastore, wanted: Datastore) -> bool:
    listed = ["meta.json", *(file.file for file in wanted.meta.files())]
    return files(found.path) == {name: (wanted.path / name).read_bytes() for name in listed}
