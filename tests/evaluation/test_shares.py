"""A text that several ranks score: the numbers of one process, whatever the shares."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from knnext.datastore import Datastore
from knnext.evaluation import StreamScores, search_stream
from knnext.evaluation.shares import Shares
from knnext.index import ExactIndex, ShardedIndex
from knnext.ranks import Ranks
from tests.index.threads import PATIENCE, on_ranks
from tests.lm.tiny_models import VOCAB, tiny

pytest.importorskip("transformers")


def text_of(count: int) -> Any:
    from knnext.corpus import TokenizedDocuments

    tokens = np.random.default_rng(0).integers(0, VOCAB, count).astype(np.int32)
    return TokenizedDocuments(
        tokens=tokens,
        document_offsets=np.array([0, count // 2, count]),
        names=["a", "b"],
        num_words=np.array([3, 4]),
        num_bytes=np.array([30, 40]),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    path = tmp_path_factory.mktemp("shares") / "store"
    keys = torch.randn(500, 32, generator=torch.Generator().manual_seed(1))
    with Datastore.create(path, 32, torch.float16, key_layer="att", vocab_size=VOCAB) as store:
        store.append(keys, torch.arange(500) % VOCAB)
    return Datastore.open(path)


@pytest.mark.parametrize(
    ("size", "rows", "windows"),
    [
        (2, 401, {"stride": 8, "batch_size": 2, "query_batch": 64}),
        (3, 401, {"stride": 16, "batch_size": 8, "query_batch": 7}),
        (3, 401, {"batch_size": 100}),  # one batch, so one rank has all of it
        (2, 2, {"batch_size": 1}),
        (2, 401, {"stride": 24, "batch_size": 1, "query_batch": 50, "separate_documents": True}),
        (2, 401, {}),  # batches by memory, of which the ranks agree on the least
    ],
)
def test_scores_are_those_of_one_process(
    store: Datastore, size: int, rows: int, windows: dict[str, Any]
) -> None:
    model, text = tiny("llama"), text_of(rows)
    options = {"k": 20, "block_size": 32, "allow_overlap": True, **windows}
    wanted = search_stream(model, ExactIndex(store), text, **options)

    def work(group: Any, rank: int) -> StreamScores:
        index = ShardedIndex(store, group, timeout=PATIENCE)
        both = {"sharded": index, "whole": ExactIndex(store)}
        found = search_stream(copy.deepcopy(model), both, text, **options)
        assert torch.equal(found["sharded"].distances, found["whole"].distances)
        return found["sharded"]

    for found in on_ranks(size, work):
        for name in found.__dataclass_fields__:
            if isinstance(getattr(wanted, name), torch.Tensor):
                assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_whole_indexes_are_shared_where_ranks_are_given(store: Datastore) -> None:
    """As FAISS is under torchrun: every rank has all of it, and searches its share of the text."""
    model, text = tiny("llama"), text_of(401)
    options: dict[str, Any] = {"k": 5, "block_size": 32, "batch_size": 2, "keep_indices": False}
    options["allow_overlap"] = True  # or be warned that nobody can tell
    wanted = search_stream(model, ExactIndex(store), text, **options)

    def work(group: Any, rank: int) -> StreamScores:
        ranks = Ranks(group, timeout=PATIENCE)
        found = search_stream(copy.deepcopy(model), ExactIndex(store), text, ranks=ranks, **options)
        assert ranks.received > 0
        return found

    for found in on_ranks(2, work):
        assert torch.equal(found.distances, wanted.distances)
        assert torch.equal(found.log_p_lm, wanted.log_p_lm)
        assert found.indices is None


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("ends", [[5], [4, 8, 12, 13], [1, 2, 3, 100]])
def test_shares_are_cut_at_batches_and_leave_nothing_out(size: int, ends: list[int]) -> None:
    ranks = Ranks()
    ranks.size = size
    rows = Shares(ranks, np.asarray(ends)).rows
    assert len(rows) == size and rows[0][0] == 0 and rows[-1][1] == ends[-1]
    assert all(a[1] == b[0] for a, b in pairwise(rows))
    assert {cut for pair in rows for cut in pair} <= {0, *ends}
