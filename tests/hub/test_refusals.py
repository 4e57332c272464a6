"""What a repository may not do to whoever fetches it, and what each failure says."""

from __future__ import annotations

import builtins
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knnext.datastore import Datastore, DatastoreError, DatastoreWriteError
from knnext.hub import HubError, shards
from knnext.hub.card import licence_of, renew
from knnext.hub.layout import check_fit, is_ours
from knnext.hub.remote import trusted_meta
from tests.datastore import small
from tests.hub.server import Hub, Repo

REPO = "org/store"
Body = dict[str, Any]


def rewritten(content: bytes, change: Callable[[Body], None]) -> bytes:
    """meta.json or codes.json with a right checksum: whoever writes files can write checksums."""
    body = json.loads(content)
    change(body)
    body.pop("checksum")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = f"crc32:{zlib.crc32(text.encode()):08x}"
    return json.dumps(body).encode()


def leave(body: Body) -> None:
    body["shards"][0]["keys"]["file"] = "../../outside.bin"


def absolute(body: Body) -> None:
    body["documents"]["names"]["file"] = "/etc/passwd"


def pickled(body: Body) -> None:
    body["shards"][0]["keys"]["file"] = "keys.pkl"


def other_part(body: Body) -> None:
    body |= {"format_version": 2, "parts": [{"folder": "../part-00001", "rows": 40}]}


def huge(body: Body) -> None:
    body["dim"] = 10**12
    for shard in body["shards"]:
        shard["keys"]["num_bytes"] = shard["rows"] * 2 * 10**12


def documents(body: Body) -> None:
    body["documents"]["count"] = 10**15


def controls(body: Body) -> None:
    body["corpus"] = "text\x1b]0;owned\x07"


def negative(body: Body) -> None:
    body["shards"][0]["rows"] = -16


def unjoined(body: Body) -> None:
    body |= {"format_version": 2, "parts": [{"folder": "part-00001", "rows": 40}]}
    body |= {"shards": [], "num_entries": 0, "documents": None}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    return Datastore.open(small.write(tmp_path_factory.mktemp("refusals") / "S", 40))


def send(hub: Hub, store: Datastore, **changed: bytes) -> None:
    hub.repos[REPO] = Repo(private=True)
    files = {file.name: file.read_bytes() for file in store.path.iterdir() if file.name[0] != "."}
    hub.repos[REPO].change({**files, **changed})


@pytest.mark.parametrize(
    "change",
    [leave, absolute, pickled, other_part, huge, documents, controls, negative, unjoined],
)
def test_a_meta_that_lies_is_refused_before_anything_is_fetched(
    change: Callable[[Body], None], stored: Datastore, hub: Hub, tmp_path: Path
) -> None:
    content = rewritten((stored.path / "meta.json").read_bytes(), change)
    send(hub, stored, **{"meta.json": content})
    with pytest.raises(HubError, match=r"^org/store: ") as caught:
        Datastore.from_hub(REPO, tmp_path / "T")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert not hub.asked("GET", ".bin") and not hub.asked("GET", "names")
    assert not (tmp_path / "T").exists()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"magic": "other"}'),
        *(b"null", b'{"magic": "knnext-datastore", "format_version": 9}'),
    ],
)
def test_what_is_no_meta_is_refused(content: bytes) -> None:
    with pytest.raises(HubError, match=r"^org/store: "):
        trusted_meta(content, REPO)


def test_what_is_announced_and_what_is_there(
    stored: Datastore, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(hub, stored, **{"keys-00001.bin": b"short"})
    with pytest.raises(HubError, match=r"keys-00001\.bin has 5 bytes there, .* says 128$"):
        Datastore.from_hub(REPO, tmp_path / "T")
    hub.repos[REPO].change({"keys-00001.bin": None})
    with pytest.raises(HubError, match=r"has no keys-00001\.bin; it is not whole$"):
        Datastore.from_hub(REPO, tmp_path / "T")
    hub.repos[REPO].change({"meta.json": None})
    with pytest.raises(HubError, match=r"has no meta\.json; this is no datastore$"):
        Datastore.from_hub(REPO, tmp_path / "T")
    monkeypatch.setattr("knnext.hub.remote._META_BYTES", 100)
    send(hub, stored)
    hub.log.clear()
    with pytest.raises(HubError, match=r"meta\.json is announced with .* at most 100 are read"):
        Datastore.from_hub(REPO, tmp_path / "T")
    assert not hub.asked("GET", "meta.json")


def test_only_files_of_a_datastore_are_fetched(stored: Datastore, hub: Hub, tmp_path: Path) -> None:
    more = {"loader.py": b"import os", "keys.pkl": b"\x80\x04.", "a/../../x.bin": b"up"}
    send(hub, stored, **more)
    Datastore.from_hub(REPO, tmp_path / "T", only="all")
    assert not any(name in path for _, path, _ in hub.log for name in more)
    names = {file.name for file in (tmp_path / "T").iterdir()} - {".lock"}
    assert names == {file.name for file in stored.path.iterdir()} - {".lock"}


def test_values_outside_the_vocabulary_are_refused(
    hub: Hub, stored: Datastore, tmp_path: Path
) -> None:
    values = b"\xff\xff\xff\x7f" * 16

    def change(body: Body) -> None:
        body["shards"][0]["values"]["checksum"] = f"crc32:{zlib.crc32(values):08x}"

    content = rewritten((stored.path / "meta.json").read_bytes(), change)
    send(hub, stored, **{"meta.json": content, "values-00000.bin": values})
    with pytest.raises(DatastoreError, match=r"holds tokens from .* want 0 to 10"):
        Datastore.from_hub(REPO, tmp_path / "T")
    assert not (tmp_path / "T").exists()


@pytest.mark.parametrize("group", ["codes", "index", "tuning"])
def test_what_lies_beside_it_must_be_its_own(
    group: str, stored: Datastore, hub: Hub, tmp_path: Path
) -> None:
    head = {"codes": "codes/codes.json", "index": "index/index.json", "tuning": "tuning.json"}
    for content in (b"{}", b"\x80\x04.", b'{"temperature": "rm -rf", "lmbda": 0.5}'):
        send(hub, stored, **{head[group]: content})
        with pytest.raises(HubError, match=rf"^org/store: {head[group]}: "):
            Datastore.from_hub(REPO, tmp_path / "T", only="all")
        assert not (tmp_path / "T").exists()


def test_somebody_elses_files_are_left_alone(stored: Datastore, hub: Hub, tmp_path: Path) -> None:
    send(hub, stored)
    (tmp_path / "T").mkdir()
    (tmp_path / "T" / "diary.txt").write_text("mine")
    with pytest.raises(DatastoreError, match="is not empty, and holds no datastore"):
        Datastore.from_hub(REPO, tmp_path / "T")
    with pytest.raises(DatastoreError, match="something else than these shards"):
        Datastore.from_hub(REPO, tmp_path / "T", shards=[0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    Datastore.from_hub(REPO, tmp_path / "T" / ".." / "link")
    assert (tmp_path / "empty" / "meta.json").is_file() and (tmp_path / "link").is_symlink()
    (tmp_path / "U.pull").symlink_to(tmp_path / "T")
    with pytest.raises(DatastoreError, match="is a link"):
        Datastore.from_hub(REPO, tmp_path / "U")
    assert [file.name for file in (tmp_path / "T").iterdir()] == ["diary.txt"]


def test_a_full_disk_is_seen_before(
    stored: Datastore, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(hub, stored)
    monkeypatch.setattr("knnext.datastore.room.free_bytes", lambda path: 100)
    with pytest.raises(DatastoreWriteError, match="what is fetched of org/store needs"):
        Datastore.from_hub(REPO, tmp_path / "T")
    assert not hub.asked("GET", ".bin")


# Failures of the hub


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "no such dataset repository, or it is private and the token cannot see it"),
        (404, "no such dataset repository, or it is private and the token cannot see it"),
        (403, "the token has not the right"),
        (500, "the server failed"),
        (429, "too many requests"),
    ],
)
@pytest.mark.parametrize("act", ["push", "pull"])
def test_each_failure_is_a_sentence(
    act: str, status: int, words: str, stored: Datastore, hub: Hub, tmp_path: Path
) -> None:
    hub.fault = lambda method, path: status if "/api/" in path and "agent" not in path else None
    with pytest.raises(HubError, match=words) as caught:
        if act == "push":
            stored.push_to_hub(REPO)
        else:
            Datastore.from_hub(REPO, tmp_path / "T")
    assert str(caught.value).startswith(REPO) and "\n" not in str(caught.value)


def test_a_repository_that_is_not_there(
    stored: Datastore, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match="no such dataset repository"):
        Datastore.from_hub("org/nothing", tmp_path / "T")
    for name in ("no good name", "a/b/c", "../up", ""):
        with pytest.raises(HubError, match="want the form 'org/name'"):
            Datastore.from_hub(name, tmp_path / "T")
        with pytest.raises(HubError, match="want the form 'org/name'"):
            stored.push_to_hub(name)
    send(hub, stored)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="the token is not valid"):
        Datastore.from_hub(REPO, tmp_path / "T")
    with pytest.raises(HubError, match="the token is not valid"):
        stored.push_to_hub(REPO)


def test_no_server(stored: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="no answer from the server"):
        Datastore.from_hub(REPO, tmp_path / "T")
    with pytest.raises(HubError, match="no answer from the server"):
        stored.push_to_hub(REPO)


def test_a_change_in_between(stored: Datastore, hub: Hub) -> None:
    hub.repos[REPO] = Repo(private=True)

    def fault(method: str, path: str) -> None:
        if path.endswith("/preupload/main"):
            hub.repos[REPO].change({"notes.txt": b"of somebody else"})

    hub.fault = fault
    with pytest.raises(HubError, match="changed meanwhile; run it again"):
        stored.push_to_hub(REPO)
    assert set(hub.repos[REPO].files()) == {".gitattributes", "notes.txt"}


def test_without_the_package(
    stored: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "huggingface_hub":
            raise ModuleNotFoundError(name, name=name)
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    for act in (lambda: stored.push_to_hub(REPO), lambda: Datastore.from_hub(REPO, tmp_path / "T")):
        with pytest.raises(ImportError, match=r"the Hub needs huggingface_hub: pip install"):
            act()


# Without a hub


def test_names_that_a_push_may_remove() -> None:
    ours = ("meta.json", "keys-00000.bin", "part-00001/values-00003.bin", "index/index.faiss")
    assert all(map(is_ours, (*ours, "codes/codes.json", "document-hashes.bin", "tuning.json")))
    others = ("README.md", ".gitattributes", "keys.bin", "data/keys-00000.bin", "index/other.json")
    assert not any(map(is_ours, (*others, "xmeta.json", "meta.json.bak", "part-1/keys-00000.bin")))


def test_shards_that_are_not_there(stored: Datastore) -> None:
    assert shards.choose(stored.meta, None, None) is None
    assert shards.choose(stored.meta, [2, 0, 2], None) == (0, 2)
    for wrong in ([3], [-1], []):
        with pytest.raises(ValueError, match=r"shards: got .*, want numbers from 0 to 2"):
            shards.choose(stored.meta, wrong, None)
    with pytest.raises(ValueError, match="was not joined from parts"):
        shards.choose(stored.meta, None, [1])
    with pytest.raises(ValueError, match="give one of them"):
        Datastore.from_hub(REPO, shards=[0], parts=[1])
    with pytest.raises(ValueError, match="nothing else; leave out only"):
        Datastore.from_hub(REPO, shards=[0], only=["keys"])


def test_fits() -> None:
    good = {
        "temperature": 1,
        "lmbda": 0.5,
        "k": 4,
        "index": "faiss",
        "nprobe": 3,
        "rescore": True,
    }
    assert check_fit(json.dumps(good).encode(), "here") == good
    wrong: list[Body] = [
        *({"temperature": 0}, {"temperature": "1"}, {"temperature": True}, {"lmbda": 1.5}),
        *({"lmbda": float("nan")}, {"k": 0}, {"k": 2.5}, {"index": "other"}, {"nprobe": "3"}),
        *({"rescore": "yes"}, {"nprobe": -1}),
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="here is not what `knnext tune` writes"):
            check_fit(json.dumps(good | change).encode(), "here")


def test_cards() -> None:
    new = "---\nlicense: mit\n---\nA\n<!-- made by knnext from meta.json -->\nnew\n"
    new += "<!-- end of what knnext made -->\n"
    old = new.replace("new", "old").replace("mit", '"odc-by"') + "mine"
    assert licence_of(old) == "odc-by" and licence_of("no front matter") is None
    assert renew("theirs", new, license=None) is None
    kept = renew(old, new, license=None)
    assert kept == old.replace("old", "new")
    assert renew(old, new, license="mit") == kept.replace('"odc-by"', "mit")
