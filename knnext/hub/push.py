"""Sending a datastore: one commit, in which it is whole, or none."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.datastore.files import file_checksum, parse_checksum
from knnext.datastore.meta import META_FILE
from knnext.datastore.meta_file import read_meta
from knnext.errors import CorruptDatastoreError, DatastoreError
from knnext.hub.card import is_path, licence_of, make_card, renew
from knnext.hub.client import HubError, asking, open_api, without_secrets
from knnext.hub.layout import (
    CARD_FILE,
    EXTRAS,
    HEADS,
    Item,
    beside,
    check_fit,
    check_groups,
    codes_items,
    index_items,
    is_ours,
    row_items,
)
from knnext.say import as_typed

if TYPE_CHECKING:
    from knnext.datastore import Datastore

_DEFAULT_EXTRAS = ("codes", "tuning")
_THREADS = 4


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: of the repository.
        commit: in which the datastore now lies there.
        files, num_bytes: that it consists of, sent now or there before.
        groups: what lies beside the rows.
        notes: what whoever sends it should know, a sentence each.
    """

    url: str
    commit: str
    files: int
    num_bytes: int
    groups: tuple[str, ...]
    notes: tuple[str, ...]


def push(
    store: Datastore,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    include: Iterable[str] | None = None,
    verify: bool = True,
) -> Pushed:
    """Send a datastore to the dataset repository ``repo_id`` in one commit.

    Files that are there already are not sent again, so a push that was interrupted goes on when it
    is repeated. Files of an earlier datastore in the repository that this one has not are removed.

    Args:
        store: open for reading, finished, and no view.
        repo_id: ``"org/name"``; a repository that is not there is made.
        revision: the branch, made where it is not there; by default ``main``.
        private: False makes, or takes, a repository that everyone can read. By default a new one is
            private, and one that is public already is refused: a datastore gives back its text.
        token: of the Hub; by default the one that is logged in.
        commit_message: by default says how many rows.
        license: stated in the card, such as ``"cc-by-sa-4.0"``; nothing is assumed where it is
            not given, and a public repository wants one.
        include: what lies beside the datastore and goes with it, of ``"codes"``, ``"index"`` and
            ``"tuning"``, or ``"all"``; an error where it is not there. By default codes and fit, if
            there are any.
        verify: compare checksums first, which reads every byte.

    Raises:
        HubError: the Hub refused or did not answer, or the repository is public; one sentence.
        DatastoreError: the datastore is a view, is unfinished, or is damaged.
    """
    if revision == "":
        raise ValueError("revision: got '', want a branch")
    _check_whole(store)
    files, items, groups, notes = _collect(store, include)
    if verify:
        _verify(files, items)
    api = open_api(token)
    with asking(repo_id, revision):
        head = _prepare(api, repo_id, revision, private)
        siblings = {file.rfilename for file in head.siblings or ()}
        size = sum(path.stat().st_size for path in files.values())
        card, old = _card(api, repo_id, head, store, groups, size, license)
        stated = license or (None if old is None else licence_of(old))
        if stated is None and private is False:
            raise HubError(
                f"{repo_id}: a public datastore wants a licence in its card: license= (--license "
                "cc-by-sa-4.0, or other), as the text and the model allow"
            )
        if stated is None:
            notes.append("the card states no licence; give one with license= (--license)")
        if card is None:
            notes.append(f"{CARD_FILE} there was written by somebody else, and stays as it is")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a card's fields that the server does not know
            done = api.create_commit(
                repo_id,
                _operations(files, card, siblings),
                repo_type="dataset",
                revision=revision,
                parent_commit=head.sha,
                commit_message=commit_message or f"Datastore of {store.num_entries:,} rows",
            )
    url = without_secrets(f"{api.endpoint}/datasets/{repo_id}")
    return Pushed(url, str(done.oid), len(files), size, groups, tuple(notes))


def _check_whole(store: Datastore) -> None:
    if store.unfinished or getattr(store, "_writer", None) is not None:
        raise DatastoreError(f"{store.path}: is not finished; only a finished datastore is sent")
    if not store.is_whole:
        raise DatastoreError(
            f"{store.path}: this is a view of {store.num_entries:,} of its rows; store them first "
            "(subsample(..., path=)) and send that"
        )
    if store.meta.deleted is not None:
        raise DatastoreError(
            f"{store.path}: {store.meta.deleted.num_rows:,} of its rows are deleted and still in "
            f"its files, which would be sent: `knnext compact {as_typed(store.path)}` first"
        )
    if read_meta(store.path, META_FILE) != store.meta:
        raise DatastoreError(f"{store.path}: has changed since it was opened; open it again")


def _collect(
    store: Datastore, include: Iterable[str] | None
) -> tuple[dict[str, Path], list[Item], tuple[str, ...], list[str]]:
    """Files by their places in the repository, what they hold, what of `EXTRAS` is there, notes."""
    asked = None if include is None else check_groups(include, EXTRAS, "include")
    files = {META_FILE: store.path / META_FILE}
    every = row_items(store.meta)
    _add(files, every, store.path, "")
    found, notes = [], []
    for group in _DEFAULT_EXTRAS if asked is None else asked:
        place = beside(store.path, group)
        head = place if group == "tuning" else place / HEADS[group].rpartition("/")[2]
        if not head.is_file():
            if asked is not None:
                raise ValueError(f"include: there is no {group} of {store.path} ({head})")
            continue
        try:
            items = _extra_items(store, group, head)
        except ValueError as error:
            if asked is not None:
                raise
            notes.append(f"left out: {error}")
            continue
        files[HEADS[group]] = head
        _add(files, items, place, f"{group}/")
        every += items
        found.append(group)
    told = {"corpus": store.meta.corpus, "model_id": store.meta.model_id}
    notes += [
        f"meta.json names a path of this machine as its {name}: {value}"
        for name, value in told.items()
        if value is not None and is_path(value)
    ]
    return files, every, tuple(found), notes


def _extra_items(store: Datastore, group: str, head: Path) -> list[Item]:
    if group == "tuning":
        check_fit(head.read_bytes(), str(head))
        return []
    describe = codes_items if group == "codes" else index_items
    return describe(head.read_bytes(), store.fingerprint)


def _add(files: dict[str, Path], items: list[Item], folder: Path, prefix: str) -> None:
    for item in items:
        path = folder / item.path.removeprefix(prefix)
        size = path.lstat().st_size
        if size != item.num_bytes:
            raise DatastoreError(
                f"{path}: has {size:,} bytes where {item.num_bytes:,} are committed: it is being "
                "extended, or an extension was cut off; end that first"
            )
        files[item.path] = path


def _verify(files: dict[str, Path], items: list[Item]) -> None:
    """CorruptDatastoreError naming every file whose bytes are not what its checksum says."""

    def check(item: Item) -> str | None:
        found = file_checksum(files[item.path], item.num_bytes)
        same = found is not None and found == parse_checksum(item.checksum)
        return None if same else f"{files[item.path]}: its content has changed (checksum)"

    with ThreadPoolExecutor(_THREADS) as pool:
        problems = [problem for problem in pool.map(check, items) if problem is not None]
    if problems:
        raise CorruptDatastoreError("; ".join(problems), problems)


def _prepare(api: Any, repo_id: str, revision: str | None, private: bool | None) -> Any:
    """The repository as it is, made where it is not there."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.dataset_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type="dataset", private=private is not False, exist_ok=True)
        info = api.dataset_info(repo_id)
    if not info.private and private is not False:
        raise HubError(
            f"{repo_id}: everyone can read this repository, and a datastore gives back its text; "
            "say private=False (--public) if the text may be public, or choose another"
        )
    if info.private and private is False:
        raise HubError(
            f"{repo_id}: this repository is private; leave out private=False (--public), or change "
            "it in its settings first"
        )
    if revision is None:
        return info
    try:
        return api.dataset_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
        return api.dataset_info(repo_id, revision=revision)


def _card(
    api: Any,
    repo_id: str,
    head: Any,
    store: Datastore,
    groups: tuple[str, ...],
    size: int,
    license: str | None,
) -> tuple[str | None, str | None]:
    """The card to be, None where what is there stays; and the card that is there."""
    facts: dict[str, Any] = {"fingerprint": store.fingerprint, "groups": groups, "num_bytes": size}
    there = any(file.rfilename == CARD_FILE for file in head.siblings or ())
    if not there:
        return make_card(repo_id, store.meta, license=license, **facts), None
    path = api.hf_hub_download(repo_id, CARD_FILE, repo_type="dataset", revision=head.sha)
    old = Path(path).read_text(encoding="utf-8", errors="replace")
    stated = license or licence_of(old)
    new = make_card(repo_id, store.meta, license=stated, **facts)
    return renew(old, new, license=license), old


def _operations(files: dict[str, Path], card: str | None, there: set[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    found: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    if card is not None:
        found.append(CommitOperationAdd(CARD_FILE, card.encode()))
    gone = sorted(name for name in there - set(files) if is_ours(name))
    return found + [CommitOperationDelete(name) for name in gone]
