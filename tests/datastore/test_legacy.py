"""Importing the raw arrays of other kNN-LM programs, their padding and overflows included."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from knnext.datastore import Datastore, DatastoreError, IncompatibleDatastoreError, legacy
from knnext.datastore import copy as datastore_copy

N, DIM, TAIL = 300, 8, 37


def arrays(n: int = N, dim: int = DIM, vocab: int = 500):
    generator = np.random.default_rng(0)
    keys = generator.standard_normal((n, dim)).astype(np.float16)
    return keys, generator.integers(1, vocab, n)


def write(keys_path: Path, keys, values, key_type: str, value_type: str, tail: int = 0) -> Path:
    """The two files as those programs leave them: allocated longer by ``tail`` zero rows."""
    long_keys = np.zeros((len(keys) + tail, keys.shape[1]), key_type)
    long_values = np.zeros((len(values) + tail, 1), value_type)
    long_keys[: len(keys)], long_values[: len(values), 0] = keys, values
    long_keys.tofile(keys_path)
    long_values.tofile(keys_path.with_name(keys_path.name.replace("_keys", "_vals")))
    return keys_path


def check(store: Datastore, keys, values) -> None:
    store = Datastore.open(store.path, verify=True)
    assert torch.equal(store.keys[:], torch.from_numpy(keys))
    assert store.values[:].tolist() == values.tolist()


@pytest.mark.parametrize("key_type", ["f2", "f4"])
@pytest.mark.parametrize("value_type", ["i2", "i4", "i8"])
def test_sizes_in_the_file_name(tmp_path, key_type, value_type):
    """knn-transformers and knnlm-limits: dstore_MODEL_N_D_keys.npy."""
    keys, values = arrays()
    name = f"dstore_gpt2_{N + TAIL}_{DIM}_keys.npy"
    write(tmp_path / name, keys, values, key_type, value_type, TAIL)
    (tmp_path / f"index_gpt2_{N + TAIL}_{DIM}.indexed").write_bytes(b"faiss")
    with pytest.warns(UserWarning, match=r"left out 37 of 337 rows.*imported 300"):
        store = Datastore.import_legacy(tmp_path, tmp_path / "ds", key_layer="att")
    check(store, keys.astype(key_type), values)
    origin = dict(store.meta.origin)
    assert origin["format"] == "knn-transformers" and origin["dropped_rows"] == TAIL
    assert origin["rows_in_files"] == N + TAIL and origin["keys"] == name
    assert origin["faiss_index_not_imported"].endswith(".indexed")
    assert "dropped_rows 37" in store.describe() and store.key_layer == "att"


@pytest.mark.parametrize(("key_type", "value_type"), [("f2", "i2"), ("f4", "i8"), ("f2", "i8")])
@pytest.mark.parametrize("known", [{"dim": DIM}, {"dim": DIM, "num_entries": N}])
def test_sizes_found_from_the_files(tmp_path, key_type, value_type, known):
    """urvashik/knnlm and knnlm-why: PREFIX_keys.npy, N and D only on the command line."""
    keys, values = arrays()
    write(tmp_path / "wiki_keys.npy", keys, values, key_type, value_type)
    store = Datastore.import_legacy(tmp_path / "wiki", tmp_path / "ds", **known)
    check(store, keys.astype(key_type), values)
    assert store.meta.origin["format"] == "knnlm"


def test_nothing_is_guessed(tmp_path):
    keys, values = arrays()
    path = write(tmp_path / "wiki_keys.npy", keys, values, "f2", "i8")
    with pytest.raises(DatastoreError, match=r"2 readings fit, such as .*Say which with .*dim or"):
        Datastore.import_legacy(path, tmp_path / "ds", num_entries=N)
    with pytest.raises(DatastoreError, match="no array of floats and token ids fits: dim=7"):
        Datastore.import_legacy(path, tmp_path / "ds", dim=7)
    assert not (tmp_path / "ds").exists()
    store = Datastore.import_legacy(path, tmp_path / "ds", key_dtype=torch.float16)
    check(store, keys, values)


def test_a_wrong_width_in_the_name_is_detected(tmp_path):
    keys, values = arrays()
    path = write(tmp_path / f"dstore_gpt2_{N}_{DIM + 1}_keys.npy", keys, values, "f2", "i4")
    with pytest.raises(DatastoreError, match="num_entries=300, dim=9"):
        Datastore.import_legacy(path, tmp_path / "ds")


def test_arrays_with_a_header(tmp_path):
    keys, values = arrays()
    np.save(tmp_path / "a_keys.npy", keys)
    np.save(tmp_path / "a_vals.npy", values[:, None])
    check(Datastore.import_legacy(tmp_path / "a", tmp_path / "ds"), keys, values)
    np.save(tmp_path / "a_keys.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"[Pp]ython objects|pickle"):
        Datastore.import_legacy(tmp_path / "a", tmp_path / "ds2")


def test_only_the_tail_is_dropped(tmp_path):
    """Rows with a zero key or a zero token, but not both, are rows; so are zeros in the middle."""
    keys, values = arrays()
    keys[-3:], values[-2:], values[-1] = 0, 0, 0
    keys[100], values[100] = 0, 0
    keys[-1, -1] = 1e-7  # the smallest subnormals count
    path = write(tmp_path / f"dstore_m_{N + TAIL}_{DIM}_keys.npy", keys, values, "f2", "i4", TAIL)
    with pytest.warns(UserWarning) as caught:
        store = Datastore.import_legacy(path, tmp_path / "ds")
    assert len(store) == N and len(caught) == 2
    assert "2 all-zero rows with token 0 lie before the end" in str(caught[1].message)
    check(store, keys, values)


@pytest.mark.parametrize("tail", [0, 1, 5, 64, 65, 200])
def test_tails_of_any_length(tmp_path, monkeypatch, tail):
    monkeypatch.setattr(legacy, "_SCAN_ROWS", 4)
    keys, values = arrays(70)
    values[-9:] = 0
    padded = np.concatenate([keys, np.zeros((tail, DIM), np.float16)])
    ids = np.concatenate([values, np.zeros(tail, np.int64)])
    assert legacy.count_valid(padded, ids) == 70
    assert legacy.count_valid(padded[70:], ids[70:]) == 0


def test_a_number_of_valid_rows(tmp_path):
    keys, values = arrays()
    path = write(tmp_path / f"dstore_m_{N}_{DIM}_keys.npy", keys, values, "f2", "i4")
    with pytest.warns(UserWarning, match="left out 100 of 300"):
        store = Datastore.import_legacy(path, tmp_path / "ds", num_valid=200)
    check(store, keys[:200], values[:200])
    with pytest.raises(ValueError, match="num_valid: got 301"):
        Datastore.import_legacy(path, tmp_path / "ds2", num_valid=301)


def test_int16_overflow(tmp_path):
    keys, values = arrays(vocab=50_000)
    values[0] = 40_000
    wrapped = values.astype(np.int16)
    path = write(tmp_path / f"dstore_m_{N}_{DIM}_keys.npy", keys, wrapped, "f2", "i2")
    with pytest.raises(DatastoreError, match=r"int16, which overflows past 32,767.*unwrap_int16"):
        Datastore.import_legacy(path, tmp_path / "ds")
    with pytest.raises(ValueError, match="vocab_size of at most 65,536"):
        Datastore.import_legacy(path, tmp_path / "ds", unwrap_int16=True)
    assert not (tmp_path / "ds").exists()
    store = Datastore.import_legacy(path, tmp_path / "ds", unwrap_int16=True, vocab_size=50_000)
    check(store, keys, values)


def test_int16_is_doubted_for_a_vocabulary_that_cannot_fit(tmp_path):
    keys, values = arrays(vocab=30_000)
    path = write(tmp_path / f"dstore_m_{N}_{DIM}_keys.npy", keys, values, "f2", "i2")
    with pytest.raises(DatastoreError, match="overflows"):
        Datastore.import_legacy(path, tmp_path / "ds", vocab_size=33_344)


def test_bad_token_ids(tmp_path):
    keys, values = arrays()
    values[7] = -1
    path = write(tmp_path / f"dstore_m_{N}_{DIM}_keys.npy", keys, values, "f2", "i8")
    with pytest.raises(DatastoreError, match="token ids run from -1 to"):
        Datastore.import_legacy(path, tmp_path / "ds")
    values[7] = 500
    write(path, keys, values, "f2", "i4")
    with pytest.raises(DatastoreError, match=r"to 500, want \[0, 499\]"):
        Datastore.import_legacy(path, tmp_path / "ds", vocab_size=500)


def test_missing_files(tmp_path):
    with pytest.raises(DatastoreError, match="holds 0 files"):
        Datastore.import_legacy(tmp_path, tmp_path / "ds")
    with pytest.raises(DatastoreError, match=r"no_keys\.npy: no such file"):
        Datastore.import_legacy(tmp_path / "no", tmp_path / "ds")
    (tmp_path / "half_keys.npy").write_bytes(bytes(64))
    with pytest.raises(DatastoreError, match=r"half_vals\.npy: the values beside"):
        Datastore.import_legacy(tmp_path / "half", tmp_path / "ds")


def test_an_import_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(datastore_copy, "_CHUNK_BYTES", 50 * DIM * 2)
    keys, values = arrays()
    path = write(tmp_path / f"dstore_m_{N}_{DIM}_keys.npy", keys, values, "f2", "i4")

    def stop(done: int, total: int) -> None:
        if done > 120:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Datastore.import_legacy(path, tmp_path / "ds", progress=stop)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(Datastore.import_legacy(path, tmp_path / "ds", resume=True), keys, values)
    write(path, keys[:250], values[:250], "f2", "i4", 50)
    with pytest.raises(IncompatibleDatastoreError, match="cannot resume: origin, dropped_rows"):
        Datastore.import_legacy(path, tmp_path / "ds", resume=True)
