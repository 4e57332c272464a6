"""ExactIndex by stored codes: the same bits as without, over whatever is searched and however."""

from __future__ import annotations

import json
import mmap
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import knnext
from knnext.datastore import Datastore
from knnext.errors import KnnextWarning
from knnext.index import ExactIndex, IndexMismatchError, StoredCodes
from tests.index.test_exact import make_datastore

DIM, ROWS = 40, 2500
DOCUMENTS = [("one", 1), ("big", 1500), ("mid", 600), ("last", 399)]


def hidden_states(rows: int, seed: int = 0) -> Tensor:
    """A large common mean, one huge dimension, and rows that try a code's patience."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, DIM, generator=generator) + 3
    keys[:, 5] *= 20
    keys[7] = 0
    keys[rows // 2] = keys[8]
    keys[11:40] = keys[10]
    keys[41] = 6e4
    keys[42] *= 1e-7
    return keys


def queries(count: int = 30) -> Tensor:
    q = hidden_states(500, seed=1)[:count].clone()
    q[0] = hidden_states(ROWS)[8]
    q[1] = float("nan")
    return q


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    keys = hidden_states(ROWS).to(getattr(torch, request.param))
    path = tmp_path_factory.mktemp("codes") / "ds"
    made = make_datastore(path, keys, documents=DOCUMENTS, entries_per_shard=700)
    StoredCodes.build(made)
    return made


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("view", ["whole", "shard", "subsample"])
def test_the_same_bits_as_without(store: Datastore, metric: str, refine: bool, view: str) -> None:
    seen = {"shard": lambda: store.shard(1, 3), "subsample": lambda: store.subsample(0.6, 3)}
    part = seen.get(view, lambda: store)()
    options: dict[str, Any] = {"metric": metric, "refine": refine}
    plain = ExactIndex(part, codes=False, **options)
    each = torch.arange(30) % 5 - 1
    for chunk_rows, resident in ((100_000, 0), (307, 1 << 30)):
        chunk_bytes = chunk_rows * (DIM + 12)
        index = ExactIndex(
            part, chunk_bytes=chunk_bytes, resident_bytes=resident, query_batch=7, **options
        )
        assert index.codes is not None
        for k in (1, 20):  # the second call uses what the first one kept
            assert_same(index.search(queries(), k), plain.search(queries(), k))
        for excluded in ([1], [0, 2, 3], each):
            want = plain.search(queries(), 12, excluded)
            assert_same(index.search(queries(), 12, excluded), want)


@pytest.mark.parametrize("k", [300, ROWS - 1, ROWS + 3])
def test_many_neighbors(store: Datastore, k: int) -> None:
    """Where most rows remain possible, they are searched without codes."""
    want = ExactIndex(store, codes=False).search(queries(5), k)
    assert_same(ExactIndex(store).search(queries(5), k), want)


def test_equal_keys(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "ds", torch.ones(6000, DIM).half())
    codes = StoredCodes.build(store)
    assert int(codes[0:6000].codes.abs().max()) == 0  # the center is the key
    distances, indices = ExactIndex(store, codes=True).search(torch.ones(2, DIM), 9)
    assert (distances == 0).all() and torch.equal(indices, torch.arange(9).expand(2, 9))


def test_stored_codes_are_those_of_the_op(store: Datastore) -> None:
    codes = StoredCodes.open(store)
    want = knnext.encode_keys(store.keys[:], codes.center)
    torch.testing.assert_close(codes.center, store.keys[:].double().mean(0).float())
    for part, rows in (
        (store, torch.arange(ROWS)),
        (store.shard(2, 7), torch.arange(2 * ROWS // 7, 3 * ROWS // 7)),
        (view := store.subsample(0.3, 1), view.stored_rows(torch.arange(len(view)))),
    ):
        found = StoredCodes.open(part)
        assert len(found) == len(part)
        got = found[5:700]
        assert torch.equal(got.codes, want.codes[rows[5:700]])
        assert torch.equal(got.stats, want.stats[rows[5:700]])


def rotated_by_the_book(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """What docs/datastore-format.md says of the rotation. A change of it needs another `CODING`."""
    dim, mask, signs = rows.shape[1], (1 << 64) - 1, []
    for n in range(2 * dim):
        z = ((dim << 32) + n + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        z = z ^ z >> 31
        signs.append(-1.0 if z >> 63 else 1.0)
    width = 1 << dim.bit_length() - 1
    hadamard = np.ones((1, 1))
    while len(hadamard) < width:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    y = rows * signs[:dim]
    y[:, :width] = y[:, :width] @ hadamard / width**0.5
    y = y * signs[dim:]
    y[:, dim - width :] = y[:, dim - width :] @ hadamard / width**0.5
    return y


def test_the_files_as_they_are_specified(store: Datastore) -> None:
    folder = store.path.with_name("ds.codes")
    center = np.fromfile(folder / "center.bin", "<f4")
    codes = np.fromfile(folder / "codes.bin", "i1").reshape(ROWS, DIM)
    scale, error, norm = np.fromfile(folder / "stats.bin", "<f4").reshape(ROWS, 3).T.astype(float)
    exact = rotated_by_the_book(store.keys[:].double().numpy() - center.astype(np.float64))
    coded = scale[:, None] * codes
    missed = np.linalg.norm(exact - coded, axis=1)
    assert (missed <= error).all() and (error <= 1.001 * missed + 1e-4 * norm).all()
    np.testing.assert_allclose(norm, np.linalg.norm(coded, axis=1), rtol=1e-6)
    np.testing.assert_allclose(scale, np.abs(exact).max(axis=1) / 127, rtol=1e-4, atol=1e-7)


def test_what_codes_may_be(store: Datastore, tmp_path: Path) -> None:
    want = ExactIndex(store, codes=False).search(queries(), 9)
    stored = StoredCodes.open(store)
    for codes in ("auto", True, stored, stored[0:ROWS], knnext.encode_keys(store.keys[:])):
        index = ExactIndex(store, codes=codes)
        assert index.codes is not None and "eight-bit codes" in index.describe()
        assert_same(index.search(queries(), 9), want)
        assert_same(pickle.loads(pickle.dumps(index)).search(queries(), 9), want)
    index = ExactIndex(store, codes=False)
    assert index.codes is None and "over all keys" in index.describe()
    part = store.shard(0, 2)
    assert len(ExactIndex(part, codes=stored).codes) == len(part)
    for wrong in ("yes", 1, None, stored.center):
        with pytest.raises(TypeError, match='codes must be "auto", True, False'):
            ExactIndex(store, codes=wrong)
    with pytest.raises(ValueError, match=r"codes must be of the datastore's keys, \(2500, 40\)"):
        ExactIndex(store, codes=stored[1:ROWS])
    other = make_datastore(tmp_path / "other", hidden_states(ROWS, seed=5).half())
    with pytest.raises(IndexMismatchError, match="codes of another datastore"):
        ExactIndex(other, codes=stored)
    with pytest.raises(ValueError, match="codes serve the CPU, and this is meta"):
        ExactIndex(store, codes=True, device="meta")
    assert ExactIndex(store, device="meta").codes is None


def test_codes_that_are_not_there(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "ds", hidden_states(300).half())
    line = ExactIndex(store).describe()
    assert f"no codes in ds.codes (run `knnext index {store.path} --kind codes`)" in line
    with pytest.raises(FileNotFoundError, match=r"there is no codes in .*ds.codes: run `knnext"):
        ExactIndex(store, codes=True)
    (tmp_path / "ds.codes").mkdir()
    (tmp_path / "ds.codes" / "build.json").write_text("{}")
    assert "an encoding that has not ended" in ExactIndex(store).describe()


def test_which_way_a_search_goes(store: Datastore) -> None:
    codes = StoredCodes.open(store)
    assert codes.nbytes == ROWS * (DIM + 12) + 4 * DIM
    line = ExactIndex(store).describe()
    assert "exact search: by eight-bit codes (ds.codes), 127.11 KiB, resident; keys " in line
    assert "KiB, mapped, of which only likely rows are read" in line
    assert "KiB, streamed; keys" in ExactIndex(store, resident_bytes=1000).describe()
    assert "copied" in ExactIndex(store.subsample(0.5)).describe()


def test_without_its_codes_an_index_reads_keys_within_the_same_bounds(tmp_path: Path) -> None:
    keys = hidden_states(ROWS)
    store = make_datastore(tmp_path / "ds", keys, documents=DOCUMENTS)
    StoredCodes.build(store)
    few = queries(2)
    sizes = {"chunk_bytes": 1 << 15, "resident_bytes": ROWS * (DIM + 12)}
    index = ExactIndex(store, **sizes)
    index.search(few, 3)
    assert index.codes is not None and index.resident
    store.delete(["one"])
    store.compact()
    with pytest.warns(KnnextWarning, match="searching without codes"):
        found = index.search(few, 3)
    fresh = ExactIndex(store, codes=False, **sizes)
    assert_same(found, fresh.search(few, 3))
    assert (index.resident, index.chunk_rows) == (fresh.resident, fresh.chunk_rows)
    assert not index.resident and index.chunk_rows == (1 << 15) // (4 * DIM)


def damage(path: Path, at: int = 1000) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    ("name", "how", "error"),
    [
        ("codes.bin", damage, r"codes\.bin is damaged"),
        ("stats.bin", damage, r"stats\.bin is damaged"),
        ("center.bin", lambda path: damage(path, 3), r"center\.bin is damaged"),
        ("codes.bin", lambda path: os.truncate(path, 100), r"codes\.bin: truncated: 100 bytes"),
        ("stats.bin", Path.unlink, r"stats\.bin: the file is missing"),
        ("center.bin", Path.unlink, r"center\.bin: the file is missing"),
        ("codes.json", lambda path: damage(path, 60), r"codes\.json"),
        ("codes.json", lambda path: path.write_text("{}"), "does not describe codes"),
    ],
)
def test_damaged_codes_are_refused(tmp_path: Path, name: str, how: Any, error: str) -> None:
    store = make_datastore(tmp_path / "ds", hidden_states(900).half())
    StoredCodes.build(store)
    want = ExactIndex(store, codes=True).search(queries(), 5)
    how(tmp_path / "ds.codes" / name)
    with pytest.raises(IndexMismatchError, match=error):
        ExactIndex(store, codes=True)
    with pytest.warns(UserWarning, match=f"searching without codes: .*{error}"):
        index = ExactIndex(store)
    assert index.codes is None
    assert_same(index.search(queries(), 5), want)
    StoredCodes.build(store, overwrite=True)
    assert_same(ExactIndex(store, codes=True).search(queries(), 5), want)


@pytest.mark.parametrize("key", ["format_version", "coding"])
def test_another_coding_is_refused(tmp_path: Path, key: str) -> None:
    store = make_datastore(tmp_path / "ds", hidden_states(50).half())
    path = StoredCodes.build(store).path / "codes.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {key: 2}))
    with pytest.raises(IndexMismatchError, match="this version of knnext reads"):
        StoredCodes.open(store)


def test_an_empty_datastore(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "ds", torch.empty(0, DIM).half())
    assert len(StoredCodes.build(store)) == 0
    distances, indices = ExactIndex(store, codes=True).search(queries(), 3)
    assert (indices == -1).all() and distances.isinf().all()


def test_rows_of_few_queries_are_read_one_by_one(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While few rows are wanted of keys too large to keep, and as long as few pages are read."""
    advised, read = [], [0]

    class Spy:
        def __init__(self, buffer: Any) -> None:
            self.buffer = buffer

        def madvise(self, advice: int) -> None:
            advised.append(advice)
            self.buffer.madvise(advice)

    fresh = Datastore.open(store.path)
    real = fresh.keys._files._map
    known: dict[int, Any] = {}

    def spied(shard: int) -> Any:
        if shard not in known:
            found = real(shard)
            known[shard] = found._replace(buffer=Spy(found.buffer))
        return known[shard]

    monkeypatch.setattr(fresh.keys._files, "_map", spied)
    monkeypatch.setattr("knnext.index.chunk_reader._pages_read", lambda: read[0])
    few, shards = queries(2), 4
    both = [mmap.MADV_RANDOM] * shards + [mmap.MADV_NORMAL] * shards
    index = ExactIndex(fresh, resident_bytes=1000)
    want = ExactIndex(fresh, codes=False).search(few, 3)
    for query_count, options, expected in (
        (2, {"resident_bytes": 1000}, both),
        (30, {"resident_bytes": 1000}, []),  # 90 of 2,500 rows: many
        (2, {}, []),
        (2, {"resident_bytes": 1000, "codes": False}, []),
    ):
        del advised[:]
        ExactIndex(fresh, **options).search(queries(query_count), 3)
        assert advised == expected
    del advised[:]
    assert_same(index.search(few, 3), want)
    monkeypatch.setattr(
        "knnext.index.chunk_reader._pages_read", lambda: read.append(read[-1] + 1000) or read[-1]
    )
    assert_same(index.search(few, 3), want)
    assert advised == both * 2
    assert_same(index.search(few, 3), want)  # the last one read far too much
    assert advised == both * 2


_CHILD = """
import json, resource, sys, torch
from knnext.datastore import Datastore
from knnext.index import ExactIndex

def pages(name):
    "Bytes of the files so named that this process has touched, and of its memory without files."
    mapped, found = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            found = name in line
        elif found and line.startswith("Rss:"):
            mapped += 1024 * int(line.split()[1])
    own = next(l for l in open("/proc/self/status") if l.startswith("RssAnon:"))
    return mapped, 1024 * int(own.split()[1])

store = Datastore.open(sys.argv[1])
q = store.keys[0:2].float() + 0.01
for codes in (True, False):
    index = ExactIndex(store, codes=codes, resident_bytes=0)
    _, before = pages("keys-")
    distances, indices = index.search(q, 4)
    mapped, own = pages("keys-")
    coded, _ = pages("codes.bin")
    found = {"keys": mapped, "codes": coded, "own": own - before, "rows": indices.tolist()}
    print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")
def test_memory_stays_small_where_the_keys_are_large(tmp_path: Path) -> None:
    """With codes, hardly a page of the keys is touched, nor is any of them copied."""
    rows, dim = 30_000, 256
    generator = torch.Generator().manual_seed(0)
    topics = 4 * torch.randn(30, dim, generator=generator).repeat_interleave(1000, 0)
    keys = topics + torch.randn(rows, dim, generator=generator)
    store = make_datastore(tmp_path / "ds", keys, entries_per_shard=13_000)
    StoredCodes.build(store)
    key_bytes, limit = 4 * rows * dim, 16 << 20
    arguments = [sys.executable, "-c", _CHILD, str(store.path)]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    by_codes, plain = map(json.loads, run.stdout.splitlines())
    assert by_codes["rows"] == plain["rows"]
    assert plain["keys"] > 0.9 * key_bytes > limit
    assert by_codes["codes"] > 0.9 * rows * dim
    assert sum(by_codes[name] for name in ("keys", "codes", "own")) < limit, by_codes
