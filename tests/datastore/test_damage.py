"""Files that are not what meta.json says, or not a datastore: each has an error that says so."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest

from knnext.datastore import (
    CorruptDatastoreError,
    Datastore,
    DatastoreError,
    FormatVersionError,
)
from tests.datastore.small import begin, folder_bytes, rows, write


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A finished datastore: 3 shards of 16, 16 and 8 rows, 4 documents."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    return write(tmp_path / "ds", 40)


def edit_meta(path: Path, **changes) -> None:
    """Change fields as a forger would: with a checksum that fits."""
    body = json.loads((path / "meta.json").read_text())
    del body["checksum"]
    body.update(changes)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = f"crc32:{zlib.crc32(canonical.encode()):08x}"
    (path / "meta.json").write_text(json.dumps(body))


DATA_FILES = [
    "keys-00000.bin",
    "keys-00002.bin",
    "values-00001.bin",
    "document-starts.bin",
    "document-names.jsonl",
]


@pytest.mark.parametrize("name", DATA_FILES)
def test_truncated_and_missing_files_are_noticed_when_opening(path, name):
    file = path / name
    with file.open("r+b") as content:
        content.truncate(file.stat().st_size - 1)
    with pytest.raises(CorruptDatastoreError, match=rf"{name}: truncated: .* bytes, want"):
        Datastore.open(path)
    file.unlink()
    with pytest.raises(CorruptDatastoreError, match=rf"{name}: missing"):
        Datastore.open(path)


@pytest.mark.parametrize("name", DATA_FILES)
def test_every_flipped_byte_is_found_by_verify(path, name):
    good = (path / name).read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 0x10
        (path / name).write_bytes(bad)
        with pytest.raises(CorruptDatastoreError, match=rf"1 of 8 files .*{name}: its content"):
            Datastore.open(path).verify()
    (path / name).write_bytes(good)
    Datastore.open(path, verify=True)


def test_verify_lists_all_bad_files_and_reports_progress(path):
    for name in DATA_FILES[:3]:
        content = bytearray((path / name).read_bytes())
        content[5] ^= 1
        (path / name).write_bytes(content)
    seen = []
    with pytest.raises(CorruptDatastoreError) as caught:
        Datastore.open(path).verify(lambda done, total: seen.append((done, total)))
    assert len(caught.value.problems) == 3
    assert all(any(name in problem for problem in caught.value.problems) for name in DATA_FILES[:3])
    total = sum(len(data) for name, data in folder_bytes(path).items() if name != "meta.json")
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_every_flipped_byte_of_meta_json_is_noticed(path):
    good = (path / "meta.json").read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 0x10 if good[place] not in b" \n" else 0x40
        (path / "meta.json").write_bytes(bad)
        with pytest.raises(DatastoreError):
            Datastore.open(path)


def test_shards_exchanged_between_datastores_are_found(path, tmp_path):
    with begin(tmp_path / "other") as other:
        keys, values, ids = rows(0, 40)
        other.append(keys + 1, values, ids)
    (path / "keys-00001.bin").write_bytes((other.path / "keys-00001.bin").read_bytes())
    with pytest.raises(CorruptDatastoreError, match=r"keys-00001\.bin"):
        Datastore.open(path, verify=True)


def test_other_programs_and_versions(path):
    edit_meta(path, format_version=4)
    with pytest.raises(FormatVersionError, match="format version 4; this knnext reads 1, 2, 3"):
        Datastore.open(path)
    edit_meta(path, magic="something")
    with pytest.raises(FormatVersionError, match="magic is 'something', want 'knnext-datastore'"):
        Datastore.open(path)
    for content in (b"[1]", b"\x00\xff", b"", b'{"magic": "knnext-datastore"', b"null"):
        (path / "meta.json").write_bytes(content)
        with pytest.raises(DatastoreError, match=r"meta\.json"):
            Datastore.open(path)


def test_an_edited_meta_is_refused(path):
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.replace('"model_id": "m"', '"model_id": "n"'))
    with pytest.raises(CorruptDatastoreError, match="damaged or edited by hand"):
        Datastore.open(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_entries": 41},
        {"dim": 5},
        {"dim": -4},
        {"dim": "4"},
        {"dtype": "float8"},
        {"dtype": "float32"},
        {"metric": "cosine"},
        {"entries_per_shard": 8},
        {"shards": []},
        {"shards": None},
        {"vocab_size": 0},
        {"documents": {"count": 4}},
        {"documents": {"count": 4, "starts": 1, "names": 2}},
    ],
)
def test_numbers_that_contradict_each_other(path, changes):
    edit_meta(path, **changes)
    with pytest.raises(CorruptDatastoreError, match=r"meta\.json"):
        Datastore.open(path)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret", "a/../../secret", "sub/keys-00000.bin", "..", "", ".lock"]
)
def test_paths_in_the_meta_cannot_lead_out(path, tmp_path, name):
    (tmp_path / "secret").write_bytes(bytes(1000))
    shards = json.loads((path / "meta.json").read_text())["shards"]
    shards[0]["keys"]["file"] = name
    edit_meta(path, shards=shards)
    with pytest.raises(DatastoreError, match=r"is not a plain name"):
        Datastore.open(path)


def test_other_names_inside_the_folder_are_refused_too(path):
    shards = json.loads((path / "meta.json").read_text())["shards"]
    shards[0]["keys"]["file"] = "values-00000.bin"
    edit_meta(path, shards=shards)
    with pytest.raises(CorruptDatastoreError, match=r"want keys-00000\.bin"):
        Datastore.open(path)


def test_links_and_special_files_are_not_followed(path, tmp_path):
    outside = tmp_path / "outside"
    file = path / "keys-00001.bin"
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(DatastoreError, match="links out of the datastore's folder"):
        Datastore.open(path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DatastoreError, match="not a regular file"):
        Datastore.open(path)
    # A link that appears after opening is caught at the first read.
    file.unlink()
    file.write_bytes(outside.read_bytes())
    store = Datastore.open(path)
    file.unlink()
    file.symlink_to(outside)
    with pytest.raises(DatastoreError, match="links out"):
        store.keys[16:20]


def test_what_is_not_a_datastore(tmp_path):
    with pytest.raises(DatastoreError, match="the folder does not exist"):
        Datastore.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatastoreError, match="not a datastore"):
        Datastore.open(tmp_path / "file")
    with pytest.raises(DatastoreError, match=r"has no meta\.json"):
        Datastore.open(tmp_path)
    with pytest.raises(DatastoreError, match="not empty"):
        Datastore.create(tmp_path, 4, resume=True)
