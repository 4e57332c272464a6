"""Exact means exact far from the origin too, where the expanded form of a distance says little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knnext import Datastore, ExactIndex, knn_search

N, DIM, K = 3000, 32, 20


def store_of(keys: torch.Tensor, path: Path) -> Datastore:
    with Datastore.create(path, DIM, keys.dtype, entries_per_shard=700) as store:
        store.append(keys, torch.arange(len(keys)))
    return Datastore.open(path)


@pytest.mark.parametrize("center", [1.0, 30.0, 100.0, 3000.0])
@pytest.mark.parametrize("chunk_rows", [N, 700, 333])
def test_keys_far_from_the_origin(tmp_path: Path, center: float, chunk_rows: int) -> None:
    keys = center + 0.01 * torch.randn(N, DIM)
    queries = keys[::100] + 0.003 * torch.randn(N // 100, DIM)
    index = ExactIndex(store_of(keys, tmp_path / "s"), chunk_bytes=chunk_rows * DIM * 4)
    distances, indices = index.search(queries, K)
    exact = torch.cdist(queries.double(), keys.double()).square()
    wanted = exact.topk(K, largest=False, sorted=True)
    # Ties of float32's direct form aside, which lie closer than its own rounding.
    torch.testing.assert_close(distances.double(), wanted.values, rtol=1e-5, atol=0)
    torch.testing.assert_close(exact.gather(1, indices), wanted.values, rtol=1e-5, atol=0)


def test_a_stored_key_finds_itself_at_zero(tmp_path: Path) -> None:
    keys = (250 + torch.randn(N, DIM)).half()
    index = ExactIndex(store_of(keys, tmp_path / "s"))
    distances, indices = index.search(keys[:50], 1)
    assert distances.flatten().tolist() == [0.0] * 50
    assert torch.equal(keys[indices.flatten()], keys[:50])


def test_the_expanded_form_can_be_had(tmp_path: Path) -> None:
    keys = 100 + 0.01 * torch.randn(N, DIM)
    store = store_of(keys, tmp_path / "s")
    plain, refined = (ExactIndex(store, refine=r).search(keys[:8], K)[0] for r in (False, True))
    assert torch.equal(refined, knn_search(keys[:8], keys, K, refine=True)[0])
    assert not torch.equal(plain, refined)
