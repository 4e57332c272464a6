"""The default place of what is fetched, a folder for each commit, also without a network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from knnext.datastore.meta import META_FILE
from knnext.errors import DatastoreError
from knnext.hub.client import HubError
from knnext.hub.fetch import open_partial
from knnext.hub.layout import ROWS, beside, row_items
from knnext.output import write_text

if TYPE_CHECKING:
    from knnext.datastore import Datastore

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = 100  # signs of a folder's name that say which shards


class Cache:
    """The datastores of one repository under ``cache_dir``, by default the folder of HF_HOME."""

    def __init__(self, repo_id: str, cache_dir: str | Path | None) -> None:
        from huggingface_hub import constants

        root = Path(constants.HF_HOME) / "knnext" if cache_dir is None else Path(cache_dir)
        self.repo_id, self.folder = repo_id, root / repo_id.replace("/", "--")

    def place(self, commit: str, picked: tuple[int, ...] | None) -> Path:
        """Of a commit, or of some of its shards."""
        some = "" if picked is None else "-shards-" + "-".join(map(str, picked))
        if len(some) > _NAME:
            some = f"-shards-{hashlib.sha256(some.encode()).hexdigest()[:16]}"
        return self.folder / f"{commit[:16]}{some}"

    def note(self, revision: str | None, commit: str) -> None:
        """Which commit a branch or tag had, for when nobody can be asked."""
        if revision is None or not _COMMIT.fullmatch(revision):
            self._ref(revision).parent.mkdir(parents=True, exist_ok=True)
            write_text(self._ref(revision), commit)

    def offline(
        self,
        revision: str | None,
        only: tuple[str, ...] | None,
        shards: Sequence[int] | None,
        parts: Sequence[int] | None,
    ) -> Datastore:
        """What was fetched before; HubError where that is not here."""
        commit = revision if revision and _COMMIT.fullmatch(revision) else self._noted(revision)
        path = None
        if commit is not None and parts is None:
            picked = None if shards is None else tuple(sorted({int(n) for n in shards}))
            path = self.place(commit, picked)
        if path is not None and (only or (path / META_FILE).is_file()):
            with suppress(DatastoreError):
                store = open_partial(path)
                if all(_is_here(store, group) for group in only or ()):
                    return store
        raise HubError(
            f"{self.repo_id}: the Hub is switched off here (HF_HUB_OFFLINE=1), and {self.folder} "
            "has not what was asked for"
        )

    def _noted(self, revision: str | None) -> str | None:
        try:
            found = self._ref(revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        return found if _COMMIT.fullmatch(found) else None

    def _ref(self, revision: str | None) -> Path:
        return self.folder / "refs" / quote(revision or "main", safe="")[:200]


def _is_here(store: Datastore, group: str) -> bool:
    if group not in ROWS:
        return beside(store.path, group).exists()
    files = [item.path for item in row_items(store.meta) if item.group == group]
    return all((store.path / file).is_file() for file in files)
