"""To the hub and back with the real client: bytes compared, parts fetched, attempts interrupted."""

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
from knnext.hub import HubError, fetch, open_partial
from knnext.index import ExactIndex, FaissIndex, StoredCodes
from tests.datastore import small
from tests.hub.server import Hub, Repo

REPO = "org/store"
FIT = {
    "temperature": 2.0,
    "lmbda": 0.25,
    "k": 8,
    "index": "exact",
    "nprobe": None,
    "rescore": False,
    "perplexity": 9.5,
}


def joined(path: Path) -> Datastore:
    """Of parts of 20, 0 and 20 rows, whose shards have 16 and 4, by the joining of this house."""
    from dataclasses import replace

    from knnext.datastore.meta import BUILD_FILE, PartMeta, part_folder
    from knnext.datastore.meta_file import to_json
    from knnext.datastore.parts import join, part_origin

    rows = (20, 0, 20)
    places = [sum(rows[:n]) for n in range(4)]
    with small.begin(path) as plan:
        parts = tuple(PartMeta(part_folder(n), count) for n, count in enumerate(rows, start=1))
        meta = replace(plan.meta, parts=parts)
        plan._writer.abandon()
        plan._writer = None
    for file in path.iterdir():
        file.unlink()
    for number in range(1, 4):
        first, last = places[number - 1], places[number]
        document = 2 * (number == 3)
        origin = part_origin(meta, number, document)
        with small.begin(path / part_folder(number), origin=origin) as part:
            keys, values, documents = small.rows(first, last)
            part.append(keys, values, documents - document)
    (path / BUILD_FILE).write_bytes(to_json(meta))
    join(path)
    return Datastore.open(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Datastore]:
    """One of three shards with all that may lie beside it, and one of parts. Read only."""
    folder = tmp_path_factory.mktemp("stores")
    small.write(folder / "S", 40)
    store = Datastore.open(folder / "S")
    StoredCodes.build(store)
    pytest.importorskip("faiss")
    FaissIndex.build(store, factory="Flat")
    (folder / "S.tuning.json").write_text(json.dumps(FIT))
    return {"plain": store, "parts": joined(folder / "P")}


def files(folder: Path) -> dict[str, bytes]:
    """By path in the folder, but for locks."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def same_bytes(found: Datastore, wanted: Datastore) -> bool:
    listed = ["meta.json", *(file.file for file in wanted.meta.files())]
    return files(found.path) == {name: (wanted.path / name).read_bytes() for name in listed}


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


# Some of it


def test_some_files_now_and_the_rest_later(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    store = stores["plain"]
    store.push_to_hub(REPO, include="all")
    part = Datastore.from_hub(REPO, tmp_path / "T", only=["values", "documents", "index"])
    assert not hub.asked("GET", "keys-") and not hub.asked("GET", "codes.bin")
    assert torch.equal(part.values[:], store.values[:]) and part.fingerprint == store.fingerprint
    index = FaissIndex.open(None, part, rescore=False)
    queries = store.keys[0:3]
    assert torch.equal(
        index.tokens(index.search(queries, 4)[1]),
        store.values[FaissIndex.open(None, store, rescore=False).search(queries, 4)[1]],
    ), "without a key"
    with pytest.raises(CorruptDatastoreError, match="missing"):
        part.keys[0:1]
    with pytest.raises(DatastoreError, match=r"no meta\.json"):
        Datastore.open(tmp_path / "T")
    with pytest.raises(CorruptDatastoreError, match="missing"):
        part.verify()
    assert len(open_partial(tmp_path / "T")) == 40
    before = len(hub.log)
    whole = Datastore.from_hub(REPO, tmp_path / "T")
    assert same_bytes(whole, store)
    late = [path for method, path, _ in hub.log[before:] if method == "GET"]
    assert not any("values-" in path or "faiss" in path for path in late), "they were here"
    with pytest.raises(DatastoreError, match="nothing that was pulled"):
        open_partial(tmp_path)


def test_codes_alone_for_a_store_that_one_has(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    stores["plain"].push_to_hub(REPO)
    mine = Datastore.open(Datastore.from_hub(REPO, tmp_path / "T", only=list(ROWS)).path)
    assert not (tmp_path / "T.codes").exists() and len(mine) == 40
    before = len(hub.log)
    store = Datastore.from_hub(REPO, tmp_path / "T", only=["codes"])
    assert not any("keys-" in path for _, path, _ in hub.log[before:])
    assert len(StoredCodes.open(store)) == 40 and not (tmp_path / "T.pull").exists()
    distances, _ = ExactIndex(store).search(store.keys[0:2], 3)
    assert distances.shape == (2, 3)


ROWS = ("keys", "values", "documents")


@pytest.mark.parametrize("shards", [[0], [2], [0, 2], [1, 2], [0, 1, 2]])
def test_some_shards_are_a_datastore_of_their_rows(
    shards: list[int], stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    store = stores["plain"]
    store.push_to_hub(REPO)
    found = Datastore.from_hub(REPO, tmp_path / "T", shards=shards)
    rows = torch.cat([torch.arange(16 * n, min(16 * n + 16, 40)) for n in shards])
    assert torch.equal(found.keys[:], store.keys[rows])
    assert torch.equal(found.values[:], store.values[rows])
    numbers = torch.arange(len(rows))
    assert torch.equal(found.document_of(numbers), store.document_of(rows))
    assert list(found.document_names) == list(store.document_names)
    assert found.meta.origin["shards"] == ",".join(map(str, shards))
    Datastore.open(tmp_path / "T", verify=True)
    asked = {int(path[-9:-4]) for path in hub.asked("GET", "keys-")}
    assert asked == set(shards)
    assert Datastore.from_hub(REPO, tmp_path / "T", shards=shards).fingerprint == found.fingerprint
    with pytest.raises(DatastoreError, match="something else than these shards"):
        Datastore.from_hub(REPO, tmp_path / "T", shards=[n for n in (0, 1) if [n] != shards][:1])


@pytest.mark.parametrize(("parts", "rows"), [([3], range(20, 40)), ([1, 2, 3], range(40))])
def test_some_parts(
    parts: list[int], rows: range, stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    store, numbers = stores["parts"], torch.tensor(list(rows))
    store.push_to_hub(REPO)
    found = Datastore.from_hub(REPO, tmp_path / "T", parts=parts)
    assert torch.equal(found.keys[:], store.keys[numbers])
    ids = found.document_of(torch.arange(len(numbers)))
    assert torch.equal(ids, store.document_of(numbers))
    Datastore.open(tmp_path / "T", verify=True)
    with pytest.raises(ValueError, match="parts: got 4, want numbers from 1 to 3"):
        Datastore.from_hub(REPO, tmp_path / "no", parts=[4])
    with pytest.raises(ValueError, match="parts: got none that have rows"):
        Datastore.from_hub(REPO, tmp_path / "no", parts=[2])


def test_a_shard_of_a_part(stores: dict[str, Datastore], hub: Hub, tmp_path: Path) -> None:
    stores["parts"].push_to_hub(REPO)
    found = Datastore.from_hub(REPO, tmp_path / "T", shards=[1, 2])  # of two parts
    assert found.values[:].tolist() == [n % 11 for n in range(16, 36)]
    Datastore.open(tmp_path / "T", verify=True)


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


# What is sent, and to whom


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
