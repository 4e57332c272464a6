"""Datastores that ranks divide, and what they ask of them, for the tests of ShardedIndex."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from knnext.datastore import Datastore
from knnext.index import ExactIndex, ShardedIndex, StoredCodes
from tests.index.test_exact import grid_keys, make_datastore
from tests.index.threads import PATIENCE

Found = tuple[Tensor, Tensor]
ROWS = 1403
DOCUMENTS = [("a", 400), ("b", 3), ("c", 7), ("d", 493), ("e", 500)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    """Ties wherever one looks, in two files, with documents of all sizes."""
    folder = tmp_path_factory.mktemp("sharded")
    return make_datastore(folder / "ds", grid_keys(ROWS), documents=DOCUMENTS)


def sharded(store: Datastore, group: Any, **options: Any) -> ShardedIndex:
    return ShardedIndex(store, group, timeout=PATIENCE, **options)


def assert_same(found: Found, wanted: Found) -> None:
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


class Case:
    """A datastore, how it is divided, and what each rank asks of it: all drawn from a seed.

    `make` writes the datastore; without it the one that another process has written is opened.
    """

    def __init__(self, seed: int, size: int, folder: Path, *, make: bool = True) -> None:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rows, dim = rng.choice([1, 2, 17, 300, 1500]), rng.choice([1, 7, 24, 65, 128])
        dtype = rng.choice([torch.float16, torch.bfloat16, torch.float32])
        keys = torch.randn(rows, dim, generator=generator)
        kind = rng.choice(["gauss", "far", "twice", "grid"])
        if kind == "far":
            keys = keys * 0.01 + 100
        elif kind == "twice":
            keys = keys[torch.arange(rows) // 2]
        elif kind == "grid":
            keys = keys.round()
        metric, per_file = rng.choice(["l2", "ip"]), rng.choice([700, 100_000])
        cut = rng.randint(1, rows)
        documents = [("a", cut), *([("b", rows - cut)] if cut < rows else [])]
        coded, sampled, path = rng.random() < 0.5, rng.random() < 0.3, folder / str(seed)
        if make:
            made = {"metric": metric, "entries_per_shard": per_file}
            store = make_datastore(path, keys.to(dtype), documents=documents, **made)
            if coded:
                StoredCodes.build(store)
        store = Datastore.open(path)
        self.store = store.subsample(0.5, seed) if sampled else store
        self.options = {
            "refine": rng.random() < 0.7,
            "resident_bytes": rng.choice([0, 1 << 30]),
            "chunk_bytes": rng.choice([1000, 1 << 28]),
            "query_batch": rng.choice([3, 4096]),
            "exchange_bytes": rng.choice([1, 20_000, 1 << 29]),
        }
        rows = self.store.num_entries
        inner = sorted(rng.randint(0, rows) for _ in range(size - 1))
        self.options["bounds"] = rng.choice([None, [0, *inner, rows]])
        self.k = rng.choice([1, 3, 64, 200])
        self.asked = []
        for _ in range(size):
            count = rng.choice([0, 1, 5, 70])
            mine = torch.randn(count, dim, generator=generator)
            if rows and count:  # half of them are keys: they meet themselves, or their doubles
                which = torch.randint(0, rows, (count // 2 + 1,), generator=generator)
                mine[: len(which)] = self.store.keys[which].to(mine.dtype)
            each = torch.randint(-1, len(documents), (count,), generator=generator)
            mine = mine.to(rng.choice([dtype, torch.float32, torch.float64]))
            self.asked.append((mine, rng.choice([None, [0], each])))

    def check(self, group: Any, rank: int) -> None:
        queries, excluded = self.asked[rank]
        exact = ExactIndex(self.store, refine=self.options["refine"])
        index = sharded(self.store, group, **self.options)
        found = index.search(queries, self.k, excluded)
        assert_same(found, exact.search(queries, self.k, excluded))
