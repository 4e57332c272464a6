"""One FAISS index whose rows are divided among ranks: the answers of the whole, in every bit.

And an index of its own on every shard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.datastore import Datastore
from knnext.errors import IndexMismatchError
from knnext.index import ExactIndex, FaissIndex, Filter, ShardedIndex
from knnext.index.faiss_slice import open_slice, undivided
from knnext.index.sharded_crew import open_faiss
from knnext.ranks import RankFailedError, Ranks
from tests.index.sharded_cases import assert_same, sharded
from tests.index.test_exact import make_datastore
from tests.index.test_sharded_crew import crew
from tests.index.threads import PATIENCE, on_ranks

pytest.importorskip("faiss")
ROWS, DIM = 1403, 16
DIVIDED = ["IVF16,Flat", "IVF16,SQ8", "IVF8,PQ4x4", "PCA8,IVF8,PQ4x4", "Flat", "SQ8"]
WHOLE = ["HNSW8", "IVF8,PQ4x4fs", "SQ8,RFlat"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    keys = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("divided")
    documents = [("a", 400), ("b", 3), ("c", 1000)]
    return make_datastore(folder / "ds", keys.half(), documents=documents)


@pytest.fixture(scope="module")
def built(store: Datastore) -> Any:
    """Each index once."""
    found: dict[str, FaissIndex] = {}

    def index(factory: str) -> FaissIndex:
        if factory not in found:
            place = store.path.parent / factory.replace(",", "-")
            found[factory] = FaissIndex.build(store, place, factory, nprobe=3, gpu=False)
        return found[factory]

    return index


def queries(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factory", DIVIDED)
@pytest.mark.parametrize("bounds", [None, [0, 5, 5, ROWS]], ids=str)
def test_answers_are_those_of_the_whole_index(
    store: Datastore, built: Any, factory: str, bounds: list[int] | None
) -> None:
    whole = built(factory)
    assert undivided(whole.path, store) == ""

    def work(group: Any, rank: int) -> None:
        for rescore in (False, True):
            index = ShardedIndex(
                store, group, faiss=whole.path, bounds=bounds, timeout=PATIENCE, nprobe=3,
                rescore=rescore, gpu=False,
            )  # fmt: skip
            if index.local is not None:
                assert index.local._cpu_index.ntotal == len(index.shard)  # its own rows only
            mine = queries((7, 0, 13)[rank], rank)
            for k, kept in ((20, None), (600, Filter(exclude_documents=[0, 1]))):
                found = index.search(mine, k, filter=kept)
                wanted = whole.search(mine, k, filter=kept, rescore=rescore)
                if factory.startswith("PCA"):  # a product of matrices, which rounds by their sizes
                    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
                    assert (found[1] == wanted[1]).float().mean() > 0.95 or not len(mine)
                    continue
                assert torch.equal(found[0], wanted[0])
                assert torch.equal(found[1], wanted[1])
        assert "approximate" in index.describe()

    on_ranks(3, work)


def test_recall_is_that_of_the_whole_index(store: Datastore, built: Any) -> None:
    whole, asked = built("IVF16,SQ8"), [queries(9, 5), queries(4, 6)]

    def work(group: Any, rank: int) -> float:
        index = ShardedIndex(store, group, faiss=whole.path, timeout=PATIENCE, gpu=False, nprobe=3)
        return index.recall(asked[rank], 10).recall

    one, two = on_ranks(2, work)
    both = torch.cat(asked)
    true, found = ExactIndex(store).search(both, 10)[1], whole.search(both, 10)[1]
    hits = sum(int(torch.isin(a, b).sum()) for a, b in zip(true, found, strict=True))
    assert one == two == hits / true.numel() < 1


@pytest.mark.parametrize("factory", WHOLE)
def test_what_cannot_be_divided_says_so(store: Datastore, built: Any, factory: str) -> None:
    whole = built(factory)
    assert factory in undivided(whole.path, store)
    with pytest.raises(ValueError, match="cannot be divided"):
        open_slice(whole.path, store, (0, 5))


def test_the_others_hold_their_rows_for_the_first(store: Datastore, built: Any) -> None:
    whole, asked = built("IVF16,SQ8"), queries(6, 1)
    wanted = whole.search(asked, 30, rescore=True)

    def lead(ranks: Ranks) -> bool:
        index = open_faiss(store, whole.path, nprobe=3, rescore=True, gpu=False)
        found = index.search(asked, 30)
        assert ranks.received > 0
        return all(map(torch.equal, found, wanted))

    assert crew(lead) == [True, [], []]


def test_a_wrong_index_is_an_error_of_all(store: Datastore, built: Any, tmp_path: Path) -> None:
    other = make_datastore(tmp_path / "other", queries(50, 2).half())

    def work(group: Any, rank: int) -> None:
        with pytest.raises((IndexMismatchError, RankFailedError), match=r"another|failed"):
            ShardedIndex(other, group, faiss=built("Flat").path, timeout=PATIENCE)

    built("Flat")
    on_ranks(2, work)


def test_faiss_on_every_shard_tells_its_recall(tmp_path: Path) -> None:
    keys = torch.randn(1200, 16, generator=torch.Generator().manual_seed(1)).half()
    store = make_datastore(tmp_path / "ds", keys, documents=[("a", 700), ("b", 500)])
    queries = keys[::40].clone()
    exact = ExactIndex(store)

    def work(group: Any, rank: int) -> float:
        index = sharded(
            store, group, bounds=[0, 500, 500, 1200], faiss=True, rescore=True, gpu=False
        )
        mine = queries[rank::3]
        assert_same(index.search(mine, 9), exact.search(mine, 9))  # flat, and rescored
        found = index.search(mine, 9, [0])
        assert (found[1] >= 700).all()
        assert "FAISS" in index.describe() or rank == 1
        again = sharded(
            store, group, bounds=[0, 500, 500, 1200], faiss=True, path=tmp_path / "lists",
            factory="IVF16,PQ4", nprobe=1, gpu=False,
        )  # fmt: skip
        told = again.recall(mine, 9)
        assert told.num_queries == 30
        return told.recall

    recalls = on_ranks(3, work)
    assert len(set(recalls)) == 1 and 0 < recalls[0] < 1
    assert {path.name for path in (tmp_path / "lists").iterdir()} == {"0-500", "500-1200"}
