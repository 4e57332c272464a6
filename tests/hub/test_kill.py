"""kill -9 at file operations of a fetch: never open before it is right, and it goes on.

With HF_ENDPOINT a hub that has the store, `python tests/hub/crash_pull.py FOLDER 1` tries them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from knnext.datastore import Datastore
from tests.datastore.test_kill import run
from tests.hub.server import Hub
from tests.hub.stored import REPO


@pytest.mark.slow
def test_death_at_operations_of_a_pull(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores["plain"].push_to_hub(REPO)
    for name, value in (("HF_HUB_DISABLE_XET", "1"), ("HF_HOME", str(tmp_path / "home"))):
        monkeypatch.setenv(name, value)
    records, complaints = run("../hub/crash_pull.py", str(tmp_path), "23")
    assert {record["what"] for record in records} == {"whole", "rest", "shards"}
    assert len(records) > 8 and {record["status"] for record in records} == {-9}
    bad = [r for r in records if not (r["right"] and r["same"]) or r["left"] or r["groups"]]
    assert not bad, (bad[:5], complaints)
