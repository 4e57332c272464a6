"""Shards, samples and merged datastores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knnext.datastore import Datastore, DatastoreError, IncompatibleDatastoreError
from knnext.datastore import copy as datastore_copy

N, DIM = 103, 3


def rows(n: int = N, offset: int = 0):
    index = torch.arange(n)
    keys = (index[:, None] + torch.arange(DIM) / 8 + offset).float()
    return keys, (index + offset) % 50, index // 10


def build(path: Path, n: int = N, offset: int = 0, documents: bool = True, **options) -> Datastore:
    options = {"entries_per_shard": 20, "vocab_size": 50, "key_layer": "att", **options}
    keys, values, ids = rows(n, offset)
    with Datastore.create(path, DIM, torch.float32, **options) as store:
        if documents:
            store.set_document_names([f"{path.name} {d}" for d in range(-(-n // 10))])
        store.append(keys, values, ids if documents else None)
    return store


@pytest.fixture
def store(tmp_path) -> Datastore:
    return build(tmp_path / "ds")


@pytest.mark.parametrize("count", [1, 2, 7, N, N + 5])
def test_shards_cover_every_row_once(store, count):
    keys, values, ids = rows()
    shards = [store.shard(i, count) for i in range(count)]
    sizes = [len(shard) for shard in shards]
    assert sum(sizes) == N and max(sizes) - min(sizes) <= 1
    for shard in shards:
        a, b = shard.row_offset, shard.row_offset + len(shard)
        assert torch.equal(shard.keys[:], keys[a:b]) and shard.keys.shape == (b - a, DIM)
        assert torch.equal(shard.values[:], values[a:b].int())
        local = torch.arange(b - a)
        assert torch.equal(shard.document_of(local), ids[a:b])
        assert torch.equal(shard.stored_rows(local), local + a)
        assert shard.document_names == store.document_names
        assert len(shard.document_offsets) == store.num_documents + 1
        assert torch.equal(shard.document_offsets.diff(), torch.bincount(ids[a:b], minlength=11))
    assert torch.equal(torch.cat([k for s in shards for _, k, _ in s.iter_chunks(4)]), keys)


def test_a_shard_cannot_read_outside_itself(store):
    shard = store.shard(1, 4)
    with pytest.raises(IndexError, match=r"want rows in \[0, 26\)"):
        shard.keys[torch.tensor([26])]
    assert len(shard.keys[20:1000]) == 6
    with pytest.raises(DatastoreError, match="open for reading"):
        shard.append(*rows(2))
    for bad in ((4, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="index: got"):
            store.shard(*bad)


def test_shards_of_shards(store):
    inner = store.shard(1, 2).shard(1, 3)
    a = inner.row_offset
    assert torch.equal(inner.keys[:], rows()[0][a : a + len(inner)])
    assert torch.equal(inner.document_of(torch.tensor([0])), torch.tensor([a // 10]))


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 0.999, 1.0])
def test_subsample(store, tmp_path, fraction):
    keys, values, ids = rows()
    view = store.subsample(fraction, seed=3)
    picked = view.stored_rows(torch.arange(len(view)))
    assert len(view) == round(fraction * N) and bool((picked.diff() > 0).all())
    stored = store.subsample(fraction, seed=3, path=tmp_path / "sample")
    for sample in (view, stored, Datastore.open(tmp_path / "sample", verify=True)):
        assert torch.equal(sample.keys[:], keys[picked])
        assert torch.equal(sample.values[:], values[picked].int())
        if len(view):
            assert sample.document_names == store.document_names
            assert torch.equal(sample.document_of(torch.arange(len(picked))), ids[picked])
            assert torch.equal(sample.document_offsets, view.document_offsets)
    assert stored.meta.origin["subsample_of"] == store.fingerprint
    part = view.shard(1, 2)
    assert torch.equal(part.keys[:], keys[picked[part.row_offset :]])


def test_subsamples_are_nested_and_differ_by_seed():
    whole = set()
    for fraction in (0.01, 0.1, 0.11, 0.6, 1.0):
        rows_ = datastore_copy.sample_rows(10_000, fraction, seed=5)
        assert whole <= set(rows_.tolist()) and len(rows_) == round(fraction * 10_000)
        whole = set(rows_.tolist())
    one, two = (datastore_copy.sample_rows(10_000, 0.1, seed) for seed in (1, 2))
    assert len(set(one.tolist()) & set(two.tolist())) < 150  # 100 expected of independent samples
    for a in range(0, 10_000, 1000):  # spread evenly: 100 of each thousand, sd 9.5
        assert 60 < int(((one >= a) & (one < a + 1000)).sum()) < 140


def test_samples_of_more_rows_than_one_hash_block():
    count = datastore_copy._HASH_ROWS + 17
    picked = datastore_copy.sample_rows(count, 0.3, seed=0)
    assert len(picked) == round(0.3 * count) == len(picked.unique())
    assert int(picked[-1]) < count and bool((picked.diff() > 0).all())


def test_bad_fractions(store):
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fraction: got"):
            store.subsample(fraction)


def test_fingerprints_tell_views_apart(store):
    views = [store, store.shard(0, 2), store.shard(1, 2), store.subsample(0.5), store.shard(0, 3)]
    views += [store.subsample(0.5, seed=1), store.shard(0, 2).subsample(0.5)]
    assert len({view.fingerprint for view in views}) == len(views)
    assert (
        Datastore.open(store.path).fingerprint == store.fingerprint == store.shard(0, 1).fingerprint
    )


def test_merge(store, tmp_path):
    other = build(tmp_path / "other", 47, offset=9)
    parts = [store, other.shard(1, 2), other]
    merged = Datastore.merge(parts, tmp_path / "merged")
    merged = Datastore.open(merged.path, verify=True)
    assert torch.equal(merged.keys[:], torch.cat([part.keys[:] for part in parts]))
    assert torch.equal(merged.values[:], torch.cat([part.values[:] for part in parts]))
    assert merged.num_documents == 11 + 5 + 5
    assert merged.document_names == (*store.document_names, *other.document_names * 2)
    every = torch.arange(len(merged))
    expected = [
        p.document_of(torch.arange(len(p))) + base
        for p, base in zip(parts, (0, 11, 16), strict=True)
    ]
    assert torch.equal(merged.document_of(every), torch.cat(expected))
    assert merged.key_layer == "att" and merged.vocab_size == 50


def test_merge_with_undocumented_stores(store, tmp_path):
    plain = build(tmp_path / "plain", 5, documents=False)
    merged = Datastore.merge([plain, store], tmp_path / "merged")
    assert merged.document_names == ("plain", *store.document_names)
    assert merged.document_offsets[:3].tolist() == [0, 5, 15]
    both = Datastore.merge([plain, plain], tmp_path / "both")
    assert both.num_documents == 0 and len(both) == 10


def test_merge_refuses_stores_that_mean_other_things(store, tmp_path):
    with pytest.raises(ValueError, match="stores: got none"):
        Datastore.merge([], tmp_path / "merged")
    for index, options in enumerate(
        ({"metric": "ip"}, {"key_layer": "ffn"}, {"model_id": "m"}, {"tokenizer_hash": "t"})
    ):
        other = build(tmp_path / f"other{index}", 5, **options)
        with pytest.raises(
            IncompatibleDatastoreError, match=f"cannot merge .*{next(iter(options))}"
        ):
            Datastore.merge([store, other], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("what", ["merge", "subsample"])
def test_interrupted_copies_go_on(store, tmp_path, monkeypatch, what):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(datastore_copy, "_CHUNK_BYTES", 7 * DIM * 4)
    other = build(tmp_path / "other", 30)

    def make(name: str, **options) -> Datastore:
        if what == "merge":
            return Datastore.merge([store, other], tmp_path / name, **options)
        return store.subsample(0.7, 1, tmp_path / name, **options)

    def stop(done: int, total: int) -> None:
        assert total == (N + 30 if what == "merge" else 72)
        if done > limit:
            raise InterruptedError

    whole = make("whole")
    for limit in (10, 31, 60):  # noqa: B007 (read by stop)
        with pytest.raises(InterruptedError):
            make("part", progress=stop, resume=True)
    part = make("part", resume=True)
    for file in whole.path.iterdir():
        assert (part.path / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(IncompatibleDatastoreError, match="origin"):
        store.subsample(0.6, 1, tmp_path / "part", resume=True)


@pytest.mark.parametrize("at_most", [1, 7, 20, 33, 1000])
def test_pieces_are_views_of_one_file_each(store, at_most):
    for part in (store, store.shard(1, 4), store.shard(3, 4).shard(0, 2)):
        pieces = list(part.keys.pieces(at_most))
        assert [first for first, _ in pieces] == [0, *(last for _, last in pieces[:-1])]
        assert pieces[-1][1] == len(part) and all(0 < b - a <= at_most for a, b in pieces)
        for first, last in pieces:  # the same memory twice: nothing is copied
            once, again = part.keys[first:last], part.keys[first:last]
            assert once.data_ptr() == again.data_ptr()
        assert not part.keys.selected
    sample = store.subsample(0.5, 1)
    assert sample.keys.selected
    wanted = [(a, min(a + at_most, len(sample))) for a in range(0, len(sample), at_most)]
    assert list(sample.keys.pieces(at_most)) == wanted
    assert list(store.shard(0, N + 1).keys.pieces(at_most)) == []


def test_a_view_knows_the_fingerprint_of_the_whole(store):
    views = store.shard(0, 2), store.subsample(0.5), store.shard(0, 2).subsample(0.5)
    for view in (store, *views):
        assert view.stored_fingerprint == store.fingerprint
    assert len({view.fingerprint for view in (store, *views)}) == 4


def test_scattered_reading_gives_the_same_rows(store):
    keys = store.keys[:]
    with store.keys.scattered(), store.keys.scattered():
        assert torch.equal(store.keys[:], keys)
    assert torch.equal(store.keys[:], keys)
