"""What is sent and to whom: whole, in one commit, never public by chance; the card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.cli import main
from knnext.datastore import (
    CorruptDatastoreError,
    Datastore,
    DatastoreError,
    UnfinishedDatastoreError,
)
from knnext.hub import HubError
from tests.datastore import small
from tests.hub.server import Hub, Repo
from tests.hub.stored import REPO, same_bytes


def test_a_second_push_sends_what_is_new_and_removes_what_is_gone(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    store = stores["plain"]
    store.push_to_hub(REPO, include="all")
    assert {"index/index.faiss", "codes/codes.bin", "tuning.json"} <= set(hub.repos[REPO].files())
    hub.repos[REPO].change({"notes.txt": b"mine"})
    assert len(hub.asked("PUT", "/lfs/")) == len(hub.blobs)
    sent = len(hub.log)
    smaller = Datastore.open(small.write(tmp_path / "small", 20))
    smaller.push_to_hub(REPO)
    listed = set(hub.repos[REPO].files())
    assert listed == {
        *("README.md", "meta.json", "notes.txt", ".gitattributes", "document-starts.bin"),
        *("keys-00000.bin", "values-00000.bin", "keys-00001.bin", "values-00001.bin"),
        "document-names.jsonl",
    }
    puts = [path for method, path, _ in hub.log[sent:] if method == "PUT"]
    first = hashlib.sha256((smaller.path / "keys-00000.bin").read_bytes()).hexdigest()
    assert puts and f"/lfs/{first}" not in puts, "the first shard was there"
    assert same_bytes(Datastore.from_hub(REPO, tmp_path / "T"), smaller)


def test_an_interrupted_push_leaves_what_was_there_and_goes_on(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    Datastore.open(small.write(tmp_path / "small", 20)).push_to_hub(REPO)
    before = hub.repos[REPO].files()
    hub.fault = lambda method, path: 403 if "/commit/" in path else None
    with pytest.raises(HubError, match=r"^org/store: the token has not the right"):
        stores["plain"].push_to_hub(REPO)
    assert hub.repos[REPO].files() == before
    hub.fault, sent = (lambda method, path: None), len(hub.log)
    stores["plain"].push_to_hub(REPO)
    assert not [path for method, path, _ in hub.log[sent:] if method == "PUT"], "all was there"


def test_what_is_not_whole_is_not_sent(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    store = stores["plain"]
    with pytest.raises(DatastoreError, match=r"a view of 20 of its rows"):
        store.subsample(0.5).push_to_hub(REPO)
    with pytest.raises(DatastoreError, match="is not finished"), small.begin(tmp_path / "B") as one:
        one.append(*small.rows(0, 4))
        one.push_to_hub(REPO)
    with pytest.raises(UnfinishedDatastoreError):
        Datastore.open(tmp_path / "B")
    grown = small.write(tmp_path / "G", 20)
    with (grown / "keys-00001.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DatastoreError, match="being extended"):
        Datastore.open(grown).push_to_hub(REPO)
    damaged = small.write(tmp_path / "D", 20)
    content = bytearray((damaged / "values-00000.bin").read_bytes())
    content[0] ^= 1
    (damaged / "values-00000.bin").write_bytes(content)
    with pytest.raises(CorruptDatastoreError, match=r"values-00000\.bin: its content has changed"):
        Datastore.open(damaged).push_to_hub(REPO)
    with pytest.raises(ValueError, match="there is no index of"):
        Datastore.open(small.write(tmp_path / "E", 20)).push_to_hub(REPO, include=["index"])
    with pytest.raises(ValueError, match="include: got keys, want of codes, index, tuning"):
        store.push_to_hub(REPO, include=["keys"])
    assert not hub.repos and not hub.log, "nothing was asked of the hub"


def test_what_is_deleted_is_not_sent(hub: Hub, tmp_path: Path) -> None:
    store = Datastore.open(small.write(tmp_path / "S", 40))
    wanted = store.values[10:40].clone()
    store.delete([0])
    with pytest.raises(DatastoreError, match=r"10 of its rows are deleted .* `knnext compact"):
        Datastore.open(tmp_path / "S").push_to_hub(REPO)
    assert not hub.repos
    store.compact()
    store = Datastore.open(tmp_path / "S")
    store.push_to_hub(REPO)
    assert any(name.startswith("compact-") for name in hub.repos[REPO].files())
    found = Datastore.from_hub(REPO, tmp_path / "T")
    found.verify()
    assert torch.equal(found.values[:], wanted) and found.fingerprint == store.fingerprint
    some = Datastore.from_hub(REPO, tmp_path / "U", shards=[1])
    assert torch.equal(some.values[:], wanted[16:]) and some.meta.folder is None
    Datastore.open(tmp_path / "U", verify=True)
    assert not list((tmp_path / "U").glob("compact-*"))
    small.write(tmp_path / "other", 20)
    Datastore.open(tmp_path / "other").push_to_hub(REPO)
    assert not any(name.startswith("compact-") for name in hub.repos[REPO].files())


def test_a_text_is_not_made_public_by_chance(stores: dict[str, Datastore], hub: Hub) -> None:
    store = stores["plain"]
    hub.repos[REPO] = Repo(private=False)
    with pytest.raises(HubError, match="everyone can read this repository"):
        store.push_to_hub(REPO)
    with pytest.raises(HubError, match="wants a licence"):
        store.push_to_hub(REPO, private=False)
    store.push_to_hub(REPO, private=False, license="cc-by-sa-4.0")
    store.push_to_hub(REPO, private=False)  # the card there states it
    hub.repos["org/closed"] = Repo(private=True)
    with pytest.raises(HubError, match="this repository is private"):
        store.push_to_hub("org/closed", private=False, license="mit")
    store.push_to_hub("org/new", private=False, license="mit")
    assert not hub.repos["org/new"].private


def test_the_card(stores: dict[str, Datastore], hub: Hub, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    with small.begin(
        tmp_path / "S", model_id="/home/me/secret/model", corpus="a | <b>", key_layer="att"
    ) as store:
        store.append(*small.rows(0, 40))
    done = store.push_to_hub(REPO)
    assert [note.split(":")[0] for note in done.notes] == [
        "meta.json names a path of this machine as its model_id",
        "the card states no licence; give one with license= (--license)",
    ]
    text = hub.repos[REPO].files()["README.md"].decode()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["tags"] == ["knnext", "knn-lm", "datastore"] and "license" not in front
    assert front["size_categories"] == ["n<1K"] and front["viewer"] is False
    for wanted in (
        *("| rows | 40 |", "float16", "layer `att`", "| model | model |", "| documents | 4 |"),
        *(r"a \| \<b\>", "| tokenizer | unknown |", "not stated by whoever sent it"),
        *("A datastore is its text", store.fingerprint, 'Datastore.from_hub("org/store")'),
        hashlib.sha256((store.path / "meta.json").read_bytes()).hexdigest(),
    ):
        assert wanted in text
    assert "secret" not in text
    # What somebody adds stays, and what is made is made anew.
    hub.repos[REPO].change({"README.md": (text + "\nMy own words.\n").encode()})
    stores["plain"].push_to_hub(REPO, license="odc-by")
    renewed = hub.repos[REPO].files()["README.md"].decode()
    assert renewed.endswith("\nMy own words.\n") and "beside it | codes, tuning" in renewed
    assert yaml.safe_load(renewed.split("---\n")[1])["license"] == "odc-by"
    stores["plain"].push_to_hub(REPO)
    assert "odc-by" in hub.repos[REPO].files()["README.md"].decode()
    hub.repos[REPO].change({"README.md": b"Somebody else's card"})
    notes = stores["plain"].push_to_hub(REPO).notes
    assert hub.repos[REPO].files()["README.md"] == b"Somebody else's card"
    assert any("stays as it is" in note for note in notes)


def test_commands(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*line: str) -> dict[str, Any]:
        assert main([*line, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    store = str(stores["plain"].path)
    sent = run("push", store, REPO, "--license", "mit", "--include", "all", "--message", "rows")
    assert sent["groups"] == ["codes", "index", "tuning"] and sent["files"] == 16
    here = str(tmp_path / "T")
    some = run("pull", REPO, here, "--only", "values")
    assert (some["whole"], some["rows"], some["fetched_bytes"]) == (False, 40, 160)
    assert run("pull", REPO, here, "--only", "all")["whole"]
    assert run("info", here)["tuning"]["temperature"] == 2.0
    cut = run("pull", REPO, str(tmp_path / "cut"), "--shards", "0-1", "--revision", "main")
    assert cut["rows"] == 32
    assert main(["pull", REPO, here, "--shards", "3-1"]) == 2
    assert main(["pull", REPO, here, "--shards", "1", "--parts", "1"]) == 2
    assert main(["pull", REPO, str(tmp_path / "no"), "--only", "rows"]) == 1
    assert "want of keys, values, documents, codes, index, tuning" in capsys.readouterr().err
