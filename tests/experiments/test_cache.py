"""Artifacts: made once, whole or not at all, and taken up where they were cut."""

from __future__ import annotations

import json
import threading

import pytest

from knnext.experiments.lab.cache import SETTINGS_FILE, Cache, settings_key


def test_made_once(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "a").write_text("content")

    cache = Cache(tmp_path)
    first = cache.get("kind", {"x": 1, "y": [2]}, make)
    assert cache.get("kind", {"y": [2], "x": 1}, make) == first
    assert len(made) == 1
    assert (first / "a").read_text() == "content"
    assert json.loads((first / SETTINGS_FILE).read_text()) == {"x": 1, "y": [2]}
    assert cache.get("kind", {"x": 2, "y": [2]}, make) != first


def test_an_interrupted_one_is_taken_up(tmp_path):
    cache, seen = Cache(tmp_path), []

    def make(folder):
        seen.append(sorted(p.name for p in folder.iterdir()))
        (folder / f"part{len(seen)}").write_text("")
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get("kind", {}, make)
    assert not cache.path("kind", {}).exists()
    folder = cache.get("kind", {}, make)
    assert seen == [[], ["part1"]]
    assert {p.name for p in folder.iterdir()} == {"part1", "part2", SETTINGS_FILE}


def test_two_at_once_make_one(tmp_path):
    started, made = threading.Barrier(2), []

    def work():
        started.wait()
        Cache(tmp_path).get("kind", {}, lambda folder: made.append(folder))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(made) == 1


def test_keys_are_of_plain_values_only():
    assert settings_key({"a": 1}) != settings_key({"a": 1.5})
    with pytest.raises(TypeError, match="plain values"):
        settings_key({"a": object()})
    with pytest.raises(ValueError, match="JSON"):
        settings_key({"a": float("nan")})
