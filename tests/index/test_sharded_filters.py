"""Random filters, deletions and cuts among ranks, against every distance in float64.

Keys and queries are small whole numbers: every distance is exact, and ties are plenty. So what a
search of any kind must give follows from the numbers alone, in every bit.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from knnext.datastore import Datastore
from knnext.index import ExactIndex, FaissIndex, Filter, ShardedIndex, StoredCodes, row_set
from tests.index.test_exact import brute_force
from tests.index.threads import PATIENCE, on_ranks

KINDS = ("mask", "rows", "exclude_rows", "documents", "exclude_documents")
EACH = ("masks", "document each", "excluded each", "own_rows")


def whole_numbers(rng: random.Random, rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randint(-2, 3, (rows, dim), generator=generator).to(dtype)


@dataclass
class Search:
    """What one rank asks, and (Q, N) which rows each of its queries may find."""

    queries: Tensor
    k: int
    allowed: Tensor
    always: Filter | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Case:
    """A datastore, what is deleted of it, how it is cut, and what the ranks ask, from a seed."""

    def __init__(self, seed: int, size: int, folder: Path) -> None:
        self.rng = rng = random.Random(seed)
        rows, dim = rng.choice([1, 3, 40, 300]), rng.choice([3, 24])
        dtype = rng.choice([torch.float16, torch.bfloat16, torch.float32])
        self.metric = rng.choice(["l2", "ip"])
        cuts = sorted(rng.randint(0, rows) for _ in range(rng.choice([0, 2, 6])))
        bounds = [0, *cuts, rows]
        owner = torch.cat([torch.full((b - a,), d) for d, (a, b) in enumerate(pairwise(bounds))])
        # Two documents of one name, and documents without rows.
        self.names = [f"d{d // 2}" if rng.random() < 0.3 else f"d{d}" for d in range(len(cuts) + 1)]
        keys = whole_numbers(rng, rows, dim, dtype)
        with Datastore.create(
            folder / str(seed), dim, dtype, metric=self.metric, key_layer="att", vocab_size=97,
            entries_per_shard=rng.choice([11, 1000]),
        ) as store:  # fmt: skip
            store.set_document_names(self.names)
            store.append(keys, torch.arange(rows) % 97, owner)
        self.store = Datastore.open(folder / str(seed))
        coded = rng.random() < 0.5
        if coded and rng.random() < 0.5:
            StoredCodes.build(self.store)
        gone = rng.sample(range(len(self.names)), rng.choice([0, 0, 1, len(self.names) // 2]))
        if len(gone) < len(self.names):  # something is left
            self.store.delete(gone)
        else:
            gone = []
        if coded:
            StoredCodes.build(self.store)
        left = ~torch.isin(owner, torch.tensor(gone, dtype=torch.int64))
        self.keys, self.owner, self.gone = keys[left], owner[left], gone
        rows = len(self.keys)
        inner = sorted(rng.choice([0, rows, rng.randint(0, rows)]) for _ in range(size - 1))
        self.bounds = [0, *inner, rows]
        self.faiss = not coded and rng.random() < 0.4
        self.options: dict[str, Any] = {"factory": "Flat", "gpu": False, "faiss": True}
        if not self.faiss:
            self.options = {"codes": coded, "resident_bytes": rng.choice([0, 1 << 30])}
            self.options["chunk_bytes"] = rng.choice([700, 1 << 28])
        self.options |= {"bounds": self.bounds, "exchange_bytes": rng.choice([400, 3_000, 1 << 29])}
        self.asked = [[self._search() for _ in range(2)] for _ in range(size)]

    def _search(self) -> Search:
        rng, rows = self.rng, len(self.keys)
        count = rng.choice([0, 1, 4, 9])
        queries = whole_numbers(rng, count, self.keys.shape[1], self.keys.dtype)
        asked = Search(queries, rng.choice([1, 7, 64, 400]), torch.ones(count, rows).bool())
        if rng.random() < 0.2:
            asked.always, kept = self._of_all(rng.choice(KINDS))
            asked.allowed &= kept
        if rng.random() < 0.3:
            labels = self._labels(count)
            given = rng.choice([labels, [d for d in labels.unique().tolist() if d >= 0]])
            asked.options["exclude_documents"] = given
            asked.allowed &= self._without(given, count)
        how = rng.choice(["none", "one", "several", "list"])
        if how == "list":
            made = [(None, torch.ones(rows).bool())]
            made += [self._of_all(rng.choice(KINDS)) for _ in range(3)]
            chosen = [rng.choice(made) for _ in range(count)]
            asked.options["filter"] = [one for one, _ in chosen]
            if count:
                asked.allowed &= torch.stack([kept for _, kept in chosen])
        elif how != "none":
            self._mixed(asked, rng.sample([*KINDS, *EACH], 1 if how == "one" else 3))
        return asked

    def _of_all(self, kind: str) -> tuple[Filter, Tensor]:
        """A filter for all queries, and (N,) what it leaves."""
        rng, rows = self.rng, len(self.keys)
        if kind == "mask":
            kept = torch.rand(rows, generator=self._torch()) < rng.choice([0, 0.05, 0.6, 1])
            first, last = rng.choice(list(pairwise(self.bounds)))
            kept[first:last] = rng.random() < 0.5  # all of a rank's rows, or none
            return Filter(mask=kept), kept
        if "rows" in kind:
            some = [rng.randrange(rows) for _ in range(rng.choice([0, 1, 30]))] if rows else []
            inside = torch.isin(torch.arange(rows), torch.tensor(some, dtype=torch.int64))
        else:
            ids = rng.sample(range(len(self.names)), rng.randint(0, len(self.names)))
            some = [d if rng.random() < 0.5 or d in self.gone else self.names[d] for d in ids]
            meant = [d for d, name in enumerate(self.names) if d in some or name in some]
            inside = torch.isin(self.owner, torch.tensor(meant, dtype=torch.int64))
        return Filter(**{kind: some}), ~inside if "exclude" in kind else inside

    def _mixed(self, asked: Search, kinds: list[str]) -> None:
        count, rows, given = len(asked.queries), len(self.keys), {}
        for kind in kinds:
            if kind in KINDS and kind not in given:
                made, kept = self._of_all(kind)
                given[kind] = getattr(made, kind)
                asked.allowed &= kept
            elif kind == "masks" and "mask" not in given:
                given["mask"] = torch.rand(count, rows, generator=self._torch()) < 0.4
                asked.allowed &= given["mask"]
            elif kind == "own_rows" and rows:
                own = torch.randint(-1, rows, (count,), generator=self._torch())
                given["own_rows"] = own
                asked.allowed &= own[:, None] != torch.arange(rows)
            elif kind == "document each" and "documents" not in given:
                labels = given["documents"] = self._labels(count)
                asked.allowed &= (labels[:, None] == self.owner) | (labels[:, None] < 0)
            elif kind == "excluded each" and "exclude_documents" not in given:
                labels = given["exclude_documents"] = self._labels(count)
                asked.allowed &= self._without(labels, count)
        asked.options["filter"] = Filter(**given)

    def _labels(self, count: int) -> Tensor:
        return torch.randint(-1, len(self.names), (count,), generator=self._torch())

    def _without(self, given: Any, count: int) -> Tensor:
        if isinstance(given, Tensor):
            return given[:, None] != self.owner
        inside = torch.isin(self.owner, torch.tensor(given, dtype=torch.int64))
        return (~inside).expand(count, -1)

    def _torch(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng.getrandbits(32))

    def wanted(self, one: Search) -> tuple[Tensor, Tensor]:
        return brute_force(one.queries, self.keys, one.k, self.metric, ~one.allowed)

    def check(self, index: Any, one: Search, what: str) -> None:
        index = index.restricted(one.always)
        distances, indices = index.search(one.queries, one.k, **one.options)
        want = self.wanted(one)
        assert torch.equal(distances.double(), want[0]), what
        if not self.faiss:
            assert torch.equal(indices, want[1]), what
            return
        # Of rows that are equally far FAISS takes any.
        assert torch.equal(indices < 0, want[1] < 0), what
        for row, near, found, allowed in zip(
            one.queries, distances, indices, one.allowed, strict=True
        ):
            found = found[found >= 0]
            assert allowed[found].all() and len(found.unique()) == len(found), what
            real = brute_force(row[None], self.keys[found], len(found), self.metric)[0][0]
            assert torch.equal(real, near[: len(found)].double()), what


#: Ranks, and the seeds of the cases that one group of them does.
GROUPS = {2: range(16), 3: range(16, 34), 4: range(34, 44)}


@pytest.mark.parametrize("size", GROUPS)
def test_every_filter_on_ranks_gives_what_the_distances_say(
    one_thread: None, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_set, "LONG_RUN", 16)  # so that both kinds of runs are met
    cases = [Case(seed, size, tmp_path) for seed in GROUPS[size]]

    def work(group: Any, rank: int) -> None:
        for seed, case in zip(GROUPS[size], cases, strict=True):
            store = Datastore.open(case.store.path)  # as each process has its own
            index = ShardedIndex(store, group, timeout=PATIENCE, **case.options)
            for number, one in enumerate(case.asked[rank]):
                case.check(index, one, f"seed {seed}, rank {rank}, search {number}")

    on_ranks(size, work)
    for seed, case in zip(GROUPS[size], cases, strict=True):  # and of one process
        if case.faiss:
            index: Any = FaissIndex.build(case.store, factory="Flat", gpu=False)
        else:
            index = ExactIndex(case.store, codes=case.options["codes"])
        for one in case.asked[seed % size]:
            case.check(index, one, f"seed {seed}, alone")
