"""What a repository holds at one commit, and what of it can be believed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from knnext.datastore.meta import META_FILE, DatastoreMeta
from knnext.datastore.meta_file import from_json
from knnext.errors import DatastoreError
from knnext.hub.client import HubError
from knnext.say import shown

_META_BYTES = 256 << 20  # of files that are read whole
_MESSAGE = 400  # signs of a message that repeats what is there
_NAME_BYTES = 3  # of the shortest line of document names: two quotes and a line end


class Remote:
    """A repository at one commit: what it lists, and its files."""

    def __init__(self, api: Any, repo_id: str, revision: str | None) -> None:
        info = api.dataset_info(repo_id, revision=revision, files_metadata=True)
        self.api, self.repo_id, self.commit = api, repo_id, str(info.sha)
        self.sizes = {file.rfilename: file.size for file in info.siblings or ()}

    def __contains__(self, path: str) -> bool:
        return path in self.sizes

    def check(self, path: str, num_bytes: int | None = None) -> None:
        """HubError unless the repository has such a file, of that many bytes."""
        if path not in self.sizes:
            what = "this is no datastore" if path == META_FILE else "it is not whole"
            raise HubError(f"{self.repo_id}: has no {path}; {what}")
        size = self.sizes[path]
        if num_bytes is None and (size is None or size > _META_BYTES):
            raise HubError(
                f"{self.repo_id}: {path} is announced with {size!r} bytes, of which at most "
                f"{_META_BYTES:,} are read"
            )
        if num_bytes is not None and size != num_bytes:
            raise HubError(
                f"{self.repo_id}: {path} has {size!r} bytes there, and its description says "
                f"{num_bytes:,}"
            )

    def fetch(self, path: str, folder: Path) -> Path:
        """Into a folder, under its own name, going on where an attempt was interrupted."""
        return Path(
            self.api.hf_hub_download(
                self.repo_id, path, repo_type="dataset", revision=self.commit, local_dir=folder
            )
        )

    def read(self, path: str) -> bytes:
        """A small file, without leaving it anywhere."""
        self.check(path)
        with tempfile.TemporaryDirectory(prefix="knnext-pull-") as folder:
            file = self.fetch(path, Path(folder))
            if file.stat().st_size > _META_BYTES:
                raise HubError(f"{self.repo_id}: {path} is larger than announced")
            return file.read_bytes()


def trusted_meta(content: bytes, repo_id: str) -> DatastoreMeta:
    """What the remote ``meta.json`` says, where it can be true."""
    where = Path(repo_id) / META_FILE  # for messages
    try:
        meta = from_json(content, where)
    except DatastoreError as error:
        raise HubError(f"{repo_id}: {shown(str(error))[:_MESSAGE]}") from error
    if any(not text.isprintable() for text in _texts(json.loads(content))):
        raise HubError(f"{repo_id}: {META_FILE} holds control characters, which no build writes")
    documents = meta.documents
    if documents is not None and documents.count * _NAME_BYTES > documents.names.num_bytes:
        raise HubError(
            f"{repo_id}: speaks of {documents.count:,} documents, whose names have "
            f"{documents.names.num_bytes:,} bytes"
        )
    if not meta.shards and any(part.rows for part in meta.parts or ()):
        raise HubError(f"{repo_id}: its parts were never joined")
    return meta


def _texts(value: Any) -> Iterator[str]:
    """All strings in what a JSON file holds."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, str):
        yield value
