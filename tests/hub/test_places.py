"""Where what is fetched goes: places that nobody can take, several at once, no network, secrets."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from knnext.cli import main
from knnext.datastore import CorruptDatastoreError, Datastore, DatastoreError
from knnext.hub import HubError, open_partial, stage
from knnext.hub.cache import Cache
from knnext.hub.client import without_secrets
from knnext.hub.remote import Remote
from tests.hub.server import Hub
from tests.hub.stored import REPO, files, same_bytes


@pytest.fixture
def sent(stores: dict[str, Datastore], hub: Hub) -> Datastore:
    stores["plain"].push_to_hub(REPO, include="all")
    return stores["plain"]


def test_places_that_cannot_be_taken(
    sent: Datastore, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    hub.log.clear()
    for place, words in (
        (".", r"here: is the folder that you are in, .* such as .*here/store$"),
        (tmp_path / "file", "file: is a file; give another folder"),
        ("/", r"^/: want a folder"),
    ):
        for more in ({}, {"shards": [0]}, {"only": ["values"]}):
            if place == tmp_path / "file" and "shards" in more:
                continue  # which says that it is something else than these shards
            with pytest.raises(DatastoreError, match=words):
                Datastore.from_hub(REPO, place, **more)
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(DatastoreError, match=r"disk: is where a disk is mounted"):
        Datastore.from_hub(REPO, tmp_path / "disk")
    for wrong in (lambda: Datastore.from_hub(REPO, tmp_path / "T", revision=""),
                  lambda: sent.push_to_hub(REPO, revision="")):  # fmt: skip
        with pytest.raises(ValueError, match="revision: got ''"):
            wrong()
    assert not hub.asked("GET", ".bin") and Path.cwd().is_dir()
    names = {path.name for path in tmp_path.iterdir()} - {"home"}
    assert names == {"here", "file", "disk"}, "nothing is left of attempts"
    Datastore.from_hub(REPO, "store")
    assert (tmp_path / "here" / "store" / "meta.json").is_file()
    monkeypatch.chdir(tmp_path / "here" / "store")  # what lies beside it takes no folder's place
    Datastore.from_hub(REPO, ".", only=["index"])
    assert (tmp_path / "here" / "store.index" / "index.json").is_file()


@pytest.mark.parametrize("more", [{}, {"shards": [0, 1]}, {"only": ["values"]}])
def test_several_at_once_fetch_once(
    more: dict[str, Any], sent: Datastore, hub: Hub, tmp_path: Path, monkeypatch: Any
) -> None:
    """As the ranks of a training do, each by itself."""
    monkeypatch.setattr(stage, "_LOOK_SECONDS", 0.01)
    found: list[Any] = []

    def fetch() -> None:
        found.append(Datastore.from_hub(REPO, **more))

    threads = [threading.Thread(target=fetch) for _ in range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the others are waited for
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert len(found) == 5 and {store.fingerprint for store in found} == {found[0].fingerprint}
    asked = hub.asked("GET", "/values-")
    assert len(asked) == len(set(asked)) == (2 if "shards" in more else 3)
    folder = found[0].path.parent
    assert not list(folder.glob("*.pull")), "those who waited left nothing"


def test_a_part_that_is_gone_on_with_after_kills(sent: Datastore, tmp_path: Path) -> None:
    """Its files move to the stage one by one, and what says that it is a part goes last."""
    part = Datastore.from_hub(REPO, tmp_path / "T", only=["values", "documents"])
    (tmp_path / "T.pull").mkdir()
    (part.path / "values-00001.bin").rename(tmp_path / "T.pull" / "values-00001.bin")
    assert (part.path / "partial.json").is_file()
    assert same_bytes(Datastore.from_hub(REPO, tmp_path / "T"), sent)
    assert not (tmp_path / "T.pull").exists()


def test_a_part_of_a_store_in_parts(stores: dict[str, Datastore], hub: Hub, tmp_path: Path) -> None:
    stores["parts"].push_to_hub(REPO)
    Datastore.from_hub(REPO, tmp_path / "T", only=["values"])
    assert open_partial(tmp_path / "T").values[:].tolist() == [n % 11 for n in range(40)]
    before = len(hub.log)
    assert same_bytes(Datastore.from_hub(REPO, tmp_path / "T"), stores["parts"])
    late = [path for method, path, _ in hub.log[before:] if method == "GET"]
    assert not any("values-" in path for path in late), "they were here"


@pytest.mark.parametrize("more", [{}, {"shards": [1, 2]}, {"only": ["values", "documents"]}])
def test_without_a_network_what_was_fetched_is_opened(
    more: dict[str, Any], sent: Datastore, hub: Hub, tmp_path: Path, monkeypatch: Any
) -> None:
    from huggingface_hub import constants

    commit = hub.repos[REPO].branches["main"]
    there = Datastore.from_hub(REPO, **more)
    sent.push_to_hub(REPO, revision="feature/x")
    branch = Datastore.from_hub(REPO, revision="feature/x", **more)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    for revision, wanted in (
        (None, there),
        ("main", there),
        (commit, there),
        ("feature/x", branch),
    ):
        found = Datastore.from_hub(REPO, revision=revision, **more)
        assert found.path == wanted.path and found.fingerprint == wanted.fingerprint
    wrong: list[dict[str, Any]] = [
        *({"revision": "other"}, {"revision": "0" * 40}, {"shards": [0]}, {"only": ["index"]}),
        {"shards": None, "parts": [1]},
    ]
    for change in wrong:
        asked = {**more, "only": None, **change}
        if "only" in change:
            asked["shards"] = None
        with pytest.raises(HubError, match=r"switched off here \(HF_HUB_OFFLINE=1\), and .* not"):
            Datastore.from_hub(REPO, **asked)
    with pytest.raises(HubError, match=r"org/other: .*switched off"):
        Datastore.from_hub("org/other")
    with pytest.raises(HubError, match="switched off"):
        Datastore.from_hub(REPO, tmp_path / "T")
    with pytest.raises(HubError, match="switched off"):
        sent.push_to_hub(REPO)
    if more.get("only"):
        with pytest.raises(HubError, match="switched off"):
            Datastore.from_hub(REPO)  # of which a part alone is here
    assert not hub.log


def test_each_choice_of_shards_has_a_place(tmp_path: Path) -> None:
    cache = Cache(REPO, tmp_path)
    chosen = [None, (0,), tuple(range(60)), tuple(range(61)), tuple(range(0, 500, 2))]
    places = [cache.place("a" * 40, picked) for picked in chosen]
    assert len(set(places)) == len(places)
    assert all(len(place.name) < 130 for place in places)
    assert places[1].name == "a" * 16 + "-shards-0"


# Files that are not as they were announced


@pytest.mark.parametrize("size", [3, 500])
def test_a_size_that_lies(
    size: int, sent: Datastore, hub: Hub, tmp_path: Path, monkeypatch: Any
) -> None:
    usual = Remote.__init__

    def lying(remote: Any, *rest: Any) -> None:
        usual(remote, *rest)
        remote.sizes = {**remote.sizes, "keys-00001.bin": 128}

    monkeypatch.setattr(Remote, "__init__", lying)
    hub.repos[REPO].change({"keys-00001.bin": b"x" * size})
    with pytest.raises(CorruptDatastoreError, match=rf"keys-00001\.bin: has {size} bytes"):
        Datastore.from_hub(REPO, tmp_path / "T")
    assert not (tmp_path / "T").exists()


# Secrets


@pytest.mark.parametrize("token", ["hf_SECRET\nX-Other: y", "hf_SECRÉT", "hf_SEC RET"])
def test_a_token_that_is_none_is_not_shown(
    token: str, sent: Datastore, hub: Hub, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    for act in (lambda: Datastore.from_hub(REPO, tmp_path / "T", token=token),
                lambda: sent.push_to_hub(REPO, token=token)):  # fmt: skip
        with pytest.raises(HubError, match="token: holds signs that no token") as caught:
            act()
        seen: BaseException | None = caught.value
        while seen is not None:
            assert "SEC" not in str(seen)
            seen = seen.__cause__ or seen.__context__
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Secret1" * 5)
    for more in ((), ("--debug",), ("-vv",)):
        assert main(["pull", REPO, str(tmp_path / "T"), *more]) == 1
    said = capsys.readouterr()
    assert "token is not valid" in said.err and "Secret1" not in said.out + said.err


def test_what_is_secret_in_a_line() -> None:
    for secret in ("hf_" + "aB3" * 10, "Bearer hf_x", "bearer abc.def-1", "http://me:pass@host/x"):
        shown = without_secrets(f"it said {secret} and no more")
        assert "no more" in shown and "…" in shown
        assert not any(part in shown for part in ("aB3aB3", "hf_x", "abc", "pass"))
    assert without_secrets("hf_xet: HF_TOKEN, hf_transfer https://host/x@1") == (
        "hf_xet: HF_TOKEN, hf_transfer https://host/x@1"
    )


def test_an_address_with_a_password(
    sent: Datastore, hub: Hub, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("//", "//me:pass@"))
    for act in (lambda: sent.push_to_hub(REPO).url,
                lambda: files(Datastore.from_hub(REPO, tmp_path / "T").path)):  # fmt: skip
        try:
            assert "pass" not in str(act())
        except HubError as error:
            assert "pass" not in str(error)
