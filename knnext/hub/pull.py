"""Fetching a datastore, whole or in parts; nothing is in its place before all of it is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from knnext.datastore.meta import META_FILE
from knnext.datastore.verify import Progress
from knnext.hub.cache import Cache
from knnext.hub.client import asking, is_offline, open_api
from knnext.hub.fetch import Fetch
from knnext.hub.layout import GROUPS, ROWS, check_groups
from knnext.hub.remote import Remote, trusted_meta
from knnext.hub.shards import choose

if TYPE_CHECKING:
    from knnext.datastore import Datastore

#: All but "index": FAISS trusts its files, so one of somebody else's is fetched when asked for.
DEFAULT_GROUPS = (*ROWS, "codes", "tuning")


def pull(
    repo_id: str,
    folder: str | Path | None = None,
    *,
    revision: str | None = None,
    only: Iterable[str] | None = None,
    shards: Sequence[int] | None = None,
    parts: Sequence[int] | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> Datastore:
    """Fetch the datastore of a dataset repository and open it.

    Every file is of one commit, and its length and checksum are compared before the datastore takes
    its place; a repeated call goes on where one ended. What is in place already is not fetched.

    Args:
        repo_id: ``"org/name"``.
        folder: where it goes; its codes, index and fit go beside it. By default a folder for the
            commit under ``cache_dir``.
        revision: branch, tag or commit; by default ``main``.
        only: what to fetch, of ``"keys"``, ``"values"``, ``"documents"``, ``"codes"``, ``"index"``
            and ``"tuning"``, or ``"all"``. By default all but the index, which FAISS reads and
            trusts. Without keys, values or documents the folder is no datastore but a part of its
            files, see `open_partial`; what is missing can be fetched later into the same folder.
        shards: numbers, from 0, of shards to take: what comes is a datastore of their rows alone.
            Codes, index and fit are of all rows, and do not come with it.
        parts: numbers, from 1, of the parts of a datastore that was joined from parts.
        cache_dir: by default the folder ``knnext`` in HF_HOME. With HF_HUB_OFFLINE what was fetched
            there before is opened, without a look at the Hub.
        token: of the Hub; by default the one that is logged in.
        progress: is called with the bytes that are done, and all.

    Raises:
        HubError: the Hub refused or did not answer, or what is there is no datastore that can be
            trusted to be whole; one sentence.
        CorruptDatastoreError: bytes are not those that were sent.
        DatastoreError: the folder holds something else.
        DatastoreWriteError: the disk has not the room; before anything is fetched.
    """
    if shards is not None and parts is not None:
        raise ValueError("shards and parts: give one of them")
    chosen = None if only is None else check_groups(only, GROUPS, "only")
    whole = shards is None and parts is None
    if not whole and chosen is not None and set(chosen) != set(ROWS):
        raise ValueError(
            "shards, parts: come with keys, values and documents, and nothing else; leave out only "
            "(codes and an index are of all rows: make them anew)"
        )
    if revision == "":
        raise ValueError("revision: got '', want a branch, a tag or a commit")
    api = open_api(token)
    cache = None if folder is not None else Cache(repo_id, cache_dir)
    if cache is not None and is_offline():
        return cache.offline(revision, chosen, shards, parts)
    with asking(repo_id, revision):
        remote = Remote(api, repo_id, revision)
        content = remote.read(META_FILE)
    meta = trusted_meta(content, repo_id)
    picked = choose(meta, shards, parts)
    path = Path(folder or "") if cache is None else cache.place(remote.commit, picked)
    groups = chosen or DEFAULT_GROUPS
    fetch = Fetch(remote, path.resolve(), meta, content, progress or (lambda done, total: None))
    if picked is not None:
        store = fetch.some(picked)
    else:
        store = fetch.whole(groups, exactly=chosen is not None and chosen != GROUPS)
    if cache is not None:
        cache.note(revision, remote.commit)
    return store
