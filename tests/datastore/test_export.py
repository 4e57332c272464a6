"""Rows for other programs: what the packages that read them find is what is stored."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnext.cli import main
from knnext.datastore import Datastore, DatastoreWriteError, export, room
from knnext.datastore.export import FORMATS, export_rows

DIM, ROWS = 6, 40
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def write(path: Path, dtype: torch.dtype, *, documents: bool = True, rows: int = ROWS) -> Datastore:
    keys = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    values = torch.arange(rows) % 7
    with Datastore.create(path, DIM, dtype, entries_per_shard=16, vocab_size=7) as store:
        if documents:
            store.set_document_names([f"text {i}" for i in range(3)])
        store.append(keys, values, torch.arange(rows) * 3 // max(rows, 1) if documents else None)
    return Datastore.open(path)


def read_back(folder: Path, file_format: str) -> dict[str, Any]:
    if file_format == "npy":
        found = {f.stem: torch.from_numpy(np.load(f)) for f in folder.glob("*.npy")}
    elif file_format == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        parts = [safetensors.load_file(f) for f in sorted(folder.glob("rows-*.safetensors"))]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(folder / "rows.parquet")
        names = {"key": "keys", "value": "values", "document": "documents"}
        found = {
            names[name]: torch.from_numpy(
                np.array(table[name].to_pylist(), dtype=None if name == "key" else np.int32)
            )
            for name in table.column_names
        }
    return found


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [True, False])
def test_rows_come_back(
    file_format: str, dtype: torch.dtype, documents: bool, tmp_path: Path
) -> None:
    store = write(tmp_path / "store", dtype, documents=documents)
    seen: list[int] = []
    files = export_rows(
        store,
        tmp_path / "out",
        file_format,
        file_bytes=10 * DIM * dtype.itemsize,
        progress=lambda done, total: seen.append(done),
    )
    assert seen[-1] == ROWS and all(file.is_file() for file in files)
    if file_format == "safetensors":
        assert len(files) == 5, "40 rows by ten, and the facts"
    found = read_back(tmp_path / "out", file_format)
    kept = file_format == "safetensors" or dtype != torch.bfloat16
    if file_format != "parquet":  # a list of Python's numbers there
        assert found["keys"].dtype == (dtype if kept else torch.float32)
    assert torch.equal(found["keys"].double(), store.keys[0:ROWS].double())
    assert found["values"].tolist() == store.values[0:ROWS].tolist()
    assert ("documents" in found) == documents
    facts = json.loads((tmp_path / "out" / "datastore.json").read_text())
    assert (facts["rows"], facts["dim"], facts["vocab_size"]) == (ROWS, DIM, 7)
    if documents:
        assert found["documents"].tolist() == store.document_of(torch.arange(ROWS)).tolist()
        assert facts["document_names"] == ["text 0", "text 1", "text 2"]
    else:
        assert facts["document_names"] is None
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("file_format", FORMATS)
def test_two_at_once_are_one_whole_and_one_refused(file_format: str, tmp_path: Path) -> None:
    store = write(tmp_path / "store", torch.float16)

    def meanwhile(done: int, total: int) -> None:
        if done == total:
            export_rows(store, tmp_path / "out", file_format)

    with pytest.raises(FileExistsError, match="made meanwhile"):
        export_rows(store, tmp_path / "out", file_format, progress=meanwhile)
    assert torch.equal(read_back(tmp_path / "out", file_format)["keys"].half(), store.keys[0:ROWS])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    """Another one that is under way, here the outer of two, is left alone."""
    store = write(tmp_path / "store", torch.float16)
    left = tmp_path / "out.1f-0.part"
    left.mkdir()
    (left / "keys.npy").touch()

    def meanwhile(done: int, total: int) -> None:
        (under_way,) = tmp_path.glob("out.*.part")  # its own
        export_rows(store, tmp_path / "out", "npy")
        assert under_way.is_dir() and not left.exists()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        export_rows(store, tmp_path / "out", "npy", progress=meanwhile)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_empty_store_and_a_view(file_format: str, tmp_path: Path) -> None:
    store = write(tmp_path / "store", torch.float16)
    export_rows(store.rows(7, 31), tmp_path / "view", file_format)
    found = read_back(tmp_path / "view", file_format)
    assert torch.equal(found["keys"].half(), store.keys[7:31])
    assert found["documents"].tolist() == store.document_of(torch.arange(7, 31)).tolist()
    empty = write(tmp_path / "empty", torch.float16, documents=False, rows=0)
    for number, nothing in enumerate((empty, store.rows(3, 3))):
        export_rows(nothing, tmp_path / f"none{number}", file_format)
        found = read_back(tmp_path / f"none{number}", file_format)
        assert {len(column) for column in found.values() if column is not None} == {0}


@pytest.mark.parametrize("file_format", FORMATS)
def test_deleted_rows_are_not_there(file_format: str, tmp_path: Path) -> None:
    store = write(tmp_path / "store", torch.float16)
    keys, values = store.keys[0:ROWS].clone(), store.values[0:ROWS].clone()
    owners, gone = store.document_of(torch.arange(ROWS)), store.document_names[1]
    Datastore.open(tmp_path / "store").delete([gone])
    left = Datastore.open(tmp_path / "store")
    export_rows(left, tmp_path / "out", file_format)
    found = read_back(tmp_path / "out", file_format)
    assert torch.equal(found["keys"].half(), keys[owners != 1])
    assert torch.equal(found["values"], values[owners != 1])
    assert found["documents"].tolist() == owners[owners != 1].tolist()
    assert gone not in (tmp_path / "out" / "datastore.json").read_text()


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_disk_that_fills_up_is_named(
    file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each library has words of its own for it, or none; the file is named and nothing stays."""
    resource = pytest.importorskip("resource")
    store = write(tmp_path / "store", torch.float16)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(OSError, match=r"out\..*\.part/") as caught:
            export_rows(store, tmp_path / "out", file_format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert caught.value.errno == errno.EFBIG
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_numpy_can_map_it(tmp_path: Path) -> None:
    store = write(tmp_path / "store", torch.float16)
    export_rows(store, tmp_path / "out", "npy")
    keys = np.load(tmp_path / "out" / "keys.npy", mmap_mode="r")
    assert keys.shape == (ROWS, DIM) and keys.dtype == np.float16


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_breaks_off_leaves_nothing(file_format: str, tmp_path: Path) -> None:
    store = write(tmp_path / "store", torch.float16)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_rows(store, tmp_path / "out", file_format, progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]
    export_rows(store, tmp_path / "out", file_format)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "store"]


def test_bad_wishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write(tmp_path / "store", torch.float16)
    with pytest.raises(ValueError, match="one of npy, safetensors, parquet, got 'csv'"):
        export_rows(store, tmp_path / "out", "csv")
    with pytest.raises(FileExistsError, match="exists"):
        export_rows(store, tmp_path / "store", "npy")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="link exists"):
        export_rows(store, tmp_path / "link", "npy")
    (tmp_path / "link").unlink()
    with pytest.raises(ValueError, match="a key of 12 bytes, got 11"):
        export_rows(store, tmp_path / "out", "safetensors", file_bytes=11)
    monkeypatch.setattr(room, "free_bytes", lambda path: 100)
    with pytest.raises(DatastoreWriteError, match="an export of 40 rows needs"):
        export_rows(store, tmp_path / "out", "npy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "store", torch.float16)
    words = ["export", str(tmp_path / "store"), str(tmp_path / "out"), "--format", "npy"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [
        "datastore.json", "documents.npy", "keys.npy", "values.npy",
    ]  # fmt: skip
    assert main(words) == 1 and "exists" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "o2"), "--format", "npy"]) == 1


def test_the_parser_knows_every_format() -> None:
    from knnext.cli.parser import build_parser

    for name in export.FORMATS:
        assert build_parser().parse_args(["export", "s", "o", "--format", name]).format == name
