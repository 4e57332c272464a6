"""Artifacts that are made once and shared: models, states, datastores, indexes, searches.

An artifact is a folder named by a hash of the settings that decide its content. It is made beside
its place and renamed when it is whole, so what exists is finished; making can take up what an
interrupted attempt left. A file lock keeps two processes from making the same one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from knnext.output import write_json

SETTINGS_FILE = "settings.json"


class Cache:
    """Artifacts below one folder, by kind and settings."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, kind: str, settings: Mapping[str, Any]) -> Path:
        """Where the artifact of these settings is, or will be."""
        return self.folder / kind / settings_key(settings)

    def get(self, kind: str, settings: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder of a finished artifact.

        Args:
            kind: for people: the folder that artifacts of this sort share.
            settings: plain values that decide the content.
            make: fills a folder, which exists and may hold the beginning of an earlier attempt.
        """
        path = self.path(kind, settings)
        if path.is_dir():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            if not path.is_dir():
                part = path.with_name(path.name + ".part")
                part.mkdir(exist_ok=True)
                make(part)
                write_json(part / SETTINGS_FILE, dict(settings))
                part.rename(path)
        return path


def settings_key(settings: Mapping[str, Any]) -> str:
    """16 hex digits that stand for plain settings, whatever the order of their names."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False, default=_refuse)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _refuse(value: Any) -> Any:
    raise TypeError(f"settings must be plain values, got {type(value).__name__}: {value!r}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
