"""Writing a datastore and reading it back: every row, every dtype, every way to ask for rows."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knnext.datastore import (
    Datastore,
    DatastoreError,
    IncompatibleDatastoreError,
)

FIXTURES = Path(__file__).parent / "fixtures"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def make_rows(n: int, dim: int, dtype: torch.dtype = torch.float16, vocab: int = 50):
    generator = torch.Generator().manual_seed(n * 1000 + dim)
    keys = torch.randn(n, dim, generator=generator).to(dtype)
    return keys, torch.randint(0, vocab, (n,), generator=generator)


def build(path, keys, values, documents=None, *, cut: int = 10**9, **options) -> Datastore:
    with Datastore.create(path, keys.shape[1], keys.dtype, **options) as store:
        for a in range(0, len(keys), cut):
            ids = None if documents is None else documents[a : a + cut]
            store.append(keys[a : a + cut], values[a : a + cut], ids)
    return store


def folder_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(path).iterdir())}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_round_trip(tmp_path_factory, data):
    n, dim = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 9))
    per_shard, cut = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    keys, values = make_rows(n, dim, data.draw(st.sampled_from(DTYPES)))
    steps = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    ids = torch.tensor(steps, dtype=torch.int64).cumsum(0)
    path = tmp_path_factory.mktemp("store") / "ds"
    build(path, keys, values, ids, cut=cut, entries_per_shard=per_shard, vocab_size=50)

    store = Datastore.open(path, verify=True)
    assert len(store) == store.num_entries == n and store.keys.shape == (n, dim)
    assert torch.equal(store.keys[:], keys) and store.keys[:].dtype == keys.dtype
    assert torch.equal(store.values[:], values.int())
    a, b = sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))
    assert torch.equal(store.keys[a:b], keys[a:b]) and torch.equal(store.values[a:b], values[a:b])
    if n:
        assert torch.equal(store.document_of(torch.arange(n)), ids)
        assert store.num_documents == int(ids[-1]) + 1
        picked = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=20))).long()
        assert torch.equal(store.keys[picked], keys[picked])
    chunks = list(store.iter_chunks(cut))
    assert [start for start, _, _ in chunks] == list(range(0, n, cut))
    assert all(len(k) == len(v) == min(cut, n - start) for start, k, v in chunks)
    if n:
        assert torch.equal(torch.cat([k for _, k, _ in chunks]), keys)


def test_bytes_depend_on_the_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    keys, values = make_rows(100, 3)
    ids = torch.arange(100) // 9
    one = build(tmp_path / "one", keys, values, ids, entries_per_shard=17)
    for cut, seconds in ((1, 0.0), (17, 1e9), (40, 0.0)):
        path = tmp_path / f"cut{cut}"
        build(path, keys, values, ids, cut=cut, entries_per_shard=17, commit_seconds=seconds)
        assert folder_bytes(path) == folder_bytes(one.path)


def test_files_are_plain_arrays(tmp_path):
    keys, values = make_rows(10, 4, torch.float32)
    store = build(tmp_path / "ds", keys, values, entries_per_shard=6)
    raw = np.memmap(store.path / "keys-00001.bin", "<f4", "r", shape=(4, 4))
    assert np.array_equal(raw, keys[6:].numpy())
    assert np.array_equal(np.fromfile(store.path / "values-00000.bin", "<i4"), values[:6].numpy())
    meta = json.loads((store.path / "meta.json").read_text())
    assert meta["magic"] == "knnext-datastore" and meta["num_entries"] == 10


def test_format_1_is_read_for_ever():
    """This folder was written by knnext 0.1.0 and must never be written anew."""
    store = Datastore.open(FIXTURES / "datastore_v1", verify=True)
    rows = torch.arange(10)
    assert torch.equal(store.keys[:], (rows[:, None] * 3 + torch.arange(3)).bfloat16())
    assert store.values[:].tolist() == [(row * 7) % 11 for row in range(10)]
    assert store.document_names == ("a.py", "b.py", "ü.py")
    assert store.document_offsets.tolist() == [0, 4, 4, 10]
    meta = store.meta
    assert (meta.metric, meta.key_layer, meta.model_id, meta.vocab_size) == ("ip", "att", "m", 11)
    assert (meta.created, meta.corpus) == ("2023-11-14T22:13:20Z", "fixture")


def test_slices_of_one_shard_are_not_copied_and_cannot_change_the_file(tmp_path):
    keys, values = make_rows(20, 4)
    path = build(tmp_path / "ds", keys, values, entries_per_shard=10).path
    before = folder_bytes(path)
    store = Datastore.open(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = store.keys[2:5]
    assert part.data_ptr() - store.keys[0:1].data_ptr() == 2 * 4 * 2
    part.fill_(7)
    store.values[0:3].fill_(9)
    assert folder_bytes(path) == before
    assert torch.equal(Datastore.open(path).keys[:], keys)
    across = store.keys[8:12]
    across.zero_()
    assert torch.equal(store.keys[8:12], keys[8:12])


def test_tensors_outlive_the_store(tmp_path):
    keys, values = make_rows(20, 4)
    with build(tmp_path / "ds", keys, values) as store:
        part = store.keys[3:6]
    del store
    assert torch.equal(part, keys[3:6])


def test_many_shards_use_few_descriptors(tmp_path):
    keys, values = make_rows(200, 2)
    store = build(tmp_path / "ds", keys, values, entries_per_shard=1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert torch.equal(store.keys[:].clone(), keys)
    assert len(list(Path("/proc/self/fd").iterdir())) - before == 128
    store.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_indexing(tmp_path):
    keys, values = make_rows(20, 4)
    store = build(tmp_path / "ds", keys, values, entries_per_shard=6)
    grid = torch.tensor([[19, 0, 19], [5, 6, 12]], dtype=torch.int32)
    assert torch.equal(store.keys[grid], keys[grid.long()])
    assert torch.equal(store.values[grid], values[grid.long()].int())
    assert torch.equal(store.keys[[3, 1]], keys[[3, 1]])
    assert torch.equal(store.keys[np.array([3, 1])], keys[[3, 1]])
    assert torch.equal(store.keys[7], keys[7]) and store.values[7] == values[7]
    assert torch.equal(store.keys[-4:], keys[-4:]) and torch.equal(store.keys[::3], keys[::3])
    assert store.keys[5:2].shape == (0, 4) and store.keys[[]].shape == (0, 4)
    with pytest.raises(IndexError, match="-1 is the padding"):
        store.keys[torch.tensor([0, -1])]
    with pytest.raises(IndexError, match="got row 20"):
        store.values[20]
    with pytest.raises(TypeError, match=r"torch\.bool"):
        store.keys[torch.ones(20, dtype=torch.bool)]
    with pytest.raises(ValueError, match="rows: got 0"):
        next(store.iter_chunks(0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda k, v: (k[:, :3], v), ValueError, r"keys: got shape \(8, 3\), want \(n, 4\)"),
        (lambda k, v: (k.int(), v), TypeError, "keys: got torch.int32"),
        (lambda k, v: (k.numpy().tolist(), v), TypeError, "keys: got list"),
        (lambda k, v: (k, v[:7]), ValueError, r"values: got shape \(7,\), want \(8,\)"),
        (lambda k, v: (k, v[:, None]), ValueError, r"values: got shape \(8, 1\)"),
        (lambda k, v: (k, v.float()), TypeError, "values: got dtype float32"),
        (lambda k, v: (k, v.index_fill(0, torch.tensor(6), 50)), ValueError, r"row 16 \(6 of this"),
        (lambda k, v: (k, v.index_fill(0, torch.tensor(2), -1)), ValueError, "row 12 .* is -1"),
        (lambda k, v: (k.index_fill(0, torch.tensor(3), np.nan), v), ValueError, "row 13 .*NaN"),
        (lambda k, v: (k.index_fill(0, torch.tensor(7), -np.inf), v), ValueError, "row 17 .*inf"),
        (lambda k, v: (k.float() * 0 + 7e4, v), ValueError, r"row 10 .*does not fit torch.float16"),
    ],
)
def test_bad_rows_are_refused_and_leave_no_trace(tmp_path, change, error, message):
    keys, values = make_rows(18, 4)
    with Datastore.create(tmp_path / "ds", 4, vocab_size=50) as store:
        store.append(keys[:10], values[:10])
        with pytest.raises(error, match=message):
            store.append(*change(keys[10:], values[10:]))
        assert store.num_entries == 10
        store.append(keys[10:], values[10:])
    assert torch.equal(Datastore.open(store.path, verify=True).keys[:], keys)


def test_values_must_fit_int32(tmp_path):
    keys, _ = make_rows(1, 4)
    with Datastore.create(tmp_path / "ds", 4) as store:
        store.append(keys, torch.tensor([2**31 - 1]))
        with pytest.raises(ValueError, match=r"2147483648, want a token id in \[0, 2147483648\)"):
            store.append(keys, torch.tensor([2**31]))
        store.append(keys.numpy(), np.array([3], dtype=np.uint16))
    assert store.values[:].tolist() == [2**31 - 1, 3]


def test_any_nan_in_any_place_is_seen(tmp_path):
    for dtype in DTYPES:
        with Datastore.create(tmp_path / str(dtype), 67, dtype) as store:
            for column in range(67):
                keys = torch.ones(2, 67, dtype=dtype)
                keys[1, column] = float("nan" if column % 2 else "inf")
                with pytest.raises(ValueError, match="row 1 "):
                    store.append(keys, torch.zeros(2, dtype=torch.int32))


def test_all_zero_keys_are_rows_like_others(tmp_path):
    store = build(tmp_path / "ds", torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64))
    assert store.num_entries == 5


def test_strided_and_converted_keys(tmp_path):
    keys, values = make_rows(12, 8, torch.float32)
    with Datastore.create(tmp_path / "ds", 4, torch.bfloat16) as store:
        store.append(keys[:, ::2].requires_grad_(), values)
    assert torch.equal(store.keys[:], keys[:, ::2].detach().bfloat16())


def test_documents_by_name(tmp_path):
    keys, values = make_rows(10, 4)
    with Datastore.create(tmp_path / "ds", 4) as store:
        store.append(keys[:4], values[:4], [("a", 3), ("line\nbreak\u2028", 1)])
        store.append(keys[4:], values[4:], [("line\nbreak\u2028", 2), ("\udcff", 1), ("a", 3)])
    store = Datastore.open(store.path)
    assert store.document_names == ("a", "line\nbreak\u2028", "\udcff", "a")
    assert store.document_offsets.tolist() == [0, 3, 6, 7, 10]
    rows = torch.tensor([[0, 3, 5], [6, 9, -1]])
    assert store.document_of(rows).tolist() == [[0, 1, 1], [2, 3, -1]]
    with pytest.raises(IndexError):
        store.document_of(torch.tensor([10]))


def test_documents_by_id_keep_their_numbers(tmp_path):
    keys, values = make_rows(6, 4)
    names = ["zero", "one", "two", "three", "four"]
    with Datastore.create(tmp_path / "ds", 4) as store:
        store.set_document_names(names)
        store.append(keys[:3], values[:3], torch.tensor([1, 1, 3]))
        store.append(keys[3:], values[3:], np.array([3, 3, 3], dtype=np.int32))
        with pytest.raises(ValueError, match="document 1 is stored as 'one', not 'uno'"):
            store.set_document_names(["zero", "uno"])
    assert store.document_names == tuple(names)
    assert store.document_offsets.tolist() == [0, 0, 2, 2, 6, 6]
    assert store.document_of(torch.arange(6)).tolist() == [1, 1, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ([0, 0, 1], ValueError, "shape"),
        ([1, 0], ValueError, "go back at row 3"),
        ([0, 1], ValueError, "row 2 is of document 0, after document 1"),
        ([-1, 0], ValueError, "document -1"),
        ([1, 10**9], ValueError, "id 1000000000"),
        ([0.0, 1.0], TypeError, "pair"),
        ([("a", 1)], ValueError, "cover 1 rows, want 2"),
        ([("a", 2), ("b", 0)], ValueError, "at least 1"),
        ([(1, 2)], TypeError, "pair"),
        (None, ValueError, "begun with documents"),
    ],
)
def test_bad_documents_are_refused(tmp_path, documents, error, message):
    keys, values = make_rows(4, 4)
    with Datastore.create(tmp_path / "ds", 4) as store:
        store.append(keys[:2], values[:2], [0, 1])
        with pytest.raises(error, match=message):
            store.append(keys[2:], values[2:], documents)
        store.append(keys[2:], values[2:], [1, 2])
    assert store.document_offsets.tolist() == [0, 1, 3, 4]


def test_a_store_without_documents_says_so(tmp_path):
    keys, values = make_rows(4, 4)
    with Datastore.create(tmp_path / "ds", 4) as store:
        store.append(keys[:2], values[:2])
        with pytest.raises(ValueError, match="begun without documents"):
            store.append(keys[2:], values[2:], [0, 0])
    assert store.num_documents == 0 and store.document_names == ()
    assert store.document_offsets.tolist() == [0]
    with pytest.raises(DatastoreError, match="without documents"):
        store.document_of(torch.tensor([0]))
    assert not list(store.path.glob("document-*"))


def test_empty_datastore(tmp_path):
    with Datastore.create(tmp_path / "ds", 4) as store:
        pass
    store = Datastore.open(store.path, verify=True)
    assert store.num_entries == 0 and store.keys[:].shape == (0, 4)
    assert store.values[:].shape == (0,) and list(store.iter_chunks(5)) == []


def test_what_is_being_written_is_not_read(tmp_path):
    keys, values = make_rows(4, 4)
    store = Datastore.create(tmp_path / "ds", 4)
    store.append(keys, values)
    for use in (lambda: store.keys, lambda: store.values, lambda: store.shard(0, 2)):
        with pytest.raises(DatastoreError, match="being written"):
            use()
    assert store.num_entries == store.meta.num_entries == 4
    store.close()
    assert torch.equal(store.keys[:], keys)
    with pytest.raises(DatastoreError, match=r"append\(\) needs a datastore from"):
        store.append(keys, values)


def test_check_compatible(tmp_path):
    keys, values = make_rows(4, 4)
    store = build(tmp_path / "ds", keys, values, model_id="gpt2", key_layer="att", vocab_size=50)
    store.check_compatible(model_id="gpt2", dim=4, tokenizer_hash="abc", vocab_size=None)
    with pytest.raises(IncompatibleDatastoreError) as caught:
        store.check_compatible(model_id="llama", key_layer="ffn", dim=5, dtype=torch.float16)
    message = str(caught.value)
    assert "model_id: datastore has 'gpt2', want 'llama'" in message
    assert "key_layer: datastore has 'att', want 'ffn'" in message and "dim" in message
    assert "dtype" not in message
    with pytest.raises(TypeError, match="knows no layer"):
        store.check_compatible(layer="att")


def test_describe(tmp_path):
    keys, values = make_rows(4, 4)
    store = build(tmp_path / "ds", keys, values, model_id="gpt2", model_revision="r1")
    text = store.describe()
    assert "float16 x 4, 32 bytes\n" in text and "gpt2 at r1" in text
    assert "finished" in text and "key_layer" in text and "unknown" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim: got 0"),
        ({"dim": 2.5}, TypeError, "dim"),
        ({"dtype": torch.float64}, ValueError, "dtype: got torch.float64"),
        ({"dtype": "float16"}, TypeError, "want an int and a torch.dtype"),
        ({"metric": "cosine"}, ValueError, "metric: got 'cosine', want 'l2' or 'ip'"),
        ({"entries_per_shard": 0}, ValueError, "entries_per_shard"),
        ({"vocab_size": 2**31}, ValueError, "vocab_size"),
        ({"model_id": 7}, TypeError, "model_id: got 7"),
        ({"origin": {"a": [1]}}, TypeError, "origin"),
    ],
)
def test_bad_parameters_make_no_folder(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        Datastore.create(tmp_path / "ds", **{"dim": 4, **options})
    assert not (tmp_path / "ds").exists()
