"""To the hub and back with the real client: bytes compared, attempts interrupted or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from knnext.datastore import (
    CorruptDatastoreError,
    Datastore,
    DatastoreError,
)
from knnext.hub import HubError, fetch
from knnext.index import StoredCodes
from tests.datastore import small
from tests.hub.server import Hub
from tests.hub.stored import FIT, REPO, files, same_bytes


@pytest.mark.parametrize("kind", ["plain", "parts"])
def test_there_and_back_the_bytes_are_the_same(
    kind: str, stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    store = stores[kind]
    done = store.push_to_hub(REPO)
    assert hub.repos[REPO].private and done.commit == hub.repos[REPO].branches["main"]
    found = Datastore.from_hub(REPO, tmp_path / "T")
    assert same_bytes(found, store) and found.fingerprint == store.fingerprint
    found.verify()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == (
        ["T", "T.codes", "T.tuning.json"] if kind == "plain" else ["T"]
    ), "an index is fetched only when it is asked for"
    if kind == "plain":
        StoredCodes.open(found)
        assert files(tmp_path / "T.codes") == files(store.path.with_name("S.codes"))
        assert json.loads((tmp_path / "T.tuning.json").read_text()) == FIT
    before = len(hub.log)
    again = Datastore.from_hub(REPO, tmp_path / "T")
    assert again.num_entries == 40
    assert not any("keys-" in path for _, path, _ in hub.log[before:]), "it is there already"


def test_revisions(stores: dict[str, Datastore], hub: Hub, tmp_path: Path) -> None:
    smaller = Datastore.open(small.write(tmp_path / "small", 20))
    first = smaller.push_to_hub(REPO).commit
    stores["plain"].push_to_hub(REPO, revision="large", commit_message="More rows")
    for revision, wanted in ((None, smaller), (first, smaller), ("large", stores["plain"])):
        found = Datastore.from_hub(REPO, tmp_path / str(revision), revision=revision)
        assert same_bytes(found, wanted)
    cached = Datastore.from_hub(REPO)  # its own place for each commit
    assert cached.path == tmp_path / "home" / "knnext" / "org--store" / first[:16]
    other = Datastore.from_hub(REPO, revision="large", cache_dir=tmp_path / "cache")
    assert other.path.parent == tmp_path / "cache" / "org--store" and len(other) == 40
    with pytest.raises(HubError, match=r"^org/store: has no branch, tag or commit at 'nowhere'$"):
        Datastore.from_hub(REPO, tmp_path / "no", revision="nowhere")
    with pytest.raises(DatastoreError, match="holds another datastore than org/store"):
        Datastore.from_hub(REPO, cached.path, revision="large")


# Interruptions and damage


@pytest.mark.parametrize("shards", [None, [0, 2]])
def test_an_interrupted_pull_goes_on_and_never_opens(
    shards: list[int] | None,
    stores: dict[str, Datastore],
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stores["plain"].push_to_hub(REPO)
    hub.fault = lambda method, path: 503 if "keys-00002" in path and method == "GET" else None
    with pytest.raises(HubError, match=r"^org/store: the server failed .* goes on from here$"):
        Datastore.from_hub(REPO, tmp_path / "T", shards=shards)
    assert not (tmp_path / "T").exists()
    with pytest.raises(DatastoreError):
        Datastore.open(tmp_path / "T.pull")
    with pytest.raises(DatastoreError):
        Datastore.open(tmp_path / "T.pull", allow_unfinished=True)
    left = tmp_path / "T.pull" / ".cache" / "huggingface" / "of.0123abcd.incomplete"
    left.write_bytes(b"of an attempt that was killed")
    hub.fault, before = (lambda method, path: None), len(hub.log)
    with monkeypatch.context() as patch:
        seen: list[bool] = []
        checked = fetch._problem
        patch.setattr(fetch, "_problem", lambda *of: (seen.append(left.exists()), checked(*of))[1])
        found = Datastore.from_hub(REPO, tmp_path / "T", shards=shards)
    assert seen and not any(seen)
    late = [path for method, path, _ in hub.log[before:] if method == "GET" and "keys-" in path]
    assert [path[-14:] for path in late] == ["keys-00002.bin"]
    found.verify()
    assert not (tmp_path / "T.pull").exists() and not list((tmp_path / "T").rglob(".cache"))


def test_a_file_cut_in_the_middle_goes_on_there(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16)
    stores["plain"].push_to_hub(REPO)
    left = ["half"]
    hub.fault = lambda method, path: (
        left.pop() if "keys-00000" in path and method == "GET" and left else None
    )
    found = Datastore.from_hub(REPO, tmp_path / "T")
    assert same_bytes(found, stores["plain"])
    ranges = [found for method, path, found in hub.log if "keys-00000" in path and found]
    assert ranges == ["bytes=64-"]


def test_another_commit_in_between_is_the_one_that_is_asked_for(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    stores["plain"].push_to_hub(REPO)
    hub.fault = lambda method, path: 503 if "keys-00002" in path and method == "GET" else None
    with pytest.raises(HubError):
        Datastore.from_hub(REPO, tmp_path / "T")
    hub.fault = lambda method, path: None
    other = small.begin(tmp_path / "other", model_id="another")
    with other:
        keys, values, documents = small.rows(0, 20)
        other.append(keys + 1, values, documents)
    other.push_to_hub(REPO)
    found = Datastore.from_hub(REPO, tmp_path / "T", only=["values"])
    assert set(files(found.path)) == {"partial.json", "values-00000.bin", "values-00001.bin"}
    found = Datastore.from_hub(REPO, tmp_path / "T")
    assert same_bytes(found, other)
    found.verify()


@pytest.mark.parametrize("place", ["there", "here"])
def test_changed_bytes_are_refused(
    place: str, stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    store = stores["plain"]
    store.push_to_hub(REPO)
    data = bytearray((store.path / "keys-00001.bin").read_bytes())
    data[5] ^= 1
    if place == "there":
        hub.repos[REPO].change({"keys-00001.bin": bytes(data)})
        with pytest.raises(CorruptDatastoreError, match=r"keys-00001\.bin: its content is not"):
            Datastore.from_hub(REPO, tmp_path / "T")
        assert not (tmp_path / "T").exists()
        return
    hub.fault = lambda method, path: 503 if "keys-00002" in path and method == "GET" else None
    with pytest.raises(HubError):
        Datastore.from_hub(REPO, tmp_path / "T")
    hub.fault = lambda method, path: None
    (tmp_path / "T.pull" / "keys-00001.bin").write_bytes(data)  # a bad disk, between two attempts
    assert same_bytes(Datastore.from_hub(REPO, tmp_path / "T"), store)
