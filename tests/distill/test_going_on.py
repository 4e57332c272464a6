"""A folder of distillation data that several processes write, or one that was stopped."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnext.datastore import Datastore, claims
from knnext.datastore.files import WriterLock
from knnext.distill import DistillationData, job
from knnext.errors import (
    DatastoreError,
    DatastoreFullError,
    DatastoreLockedError,
    IncompatibleDatastoreError,
)
from knnext.evaluation import search_stream
from knnext.index import ExactIndex, Filter, ShardedIndex
from tests.distill.test_distill import LENGTHS, WINDOWS, Made, a_text, rows, run
from tests.distill.test_distill import made as made  # a fixture

pytest.importorskip("pyarrow")
CUT: dict[str, Any] = {"shard_tokens": 50}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("[!.]*")}


@pytest.fixture(scope="module")
def whole(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes into four files and the plan."""
    folder = tmp_path_factory.mktemp("whole") / "D"
    run(made, folder, **CUT)
    assert [file.name for file in folder.glob(".*")] == [".lock"]
    found = content(folder)
    assert len(found) == 5
    return found


def test_two_at_once_divide_the_files(
    made: Made, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claims are locks of open files, so that threads are as strange to each other."""
    monkeypatch.setattr(claims, "_LOOK_SECONDS", 0.01)
    written: list[str] = []
    usual = job._Work.write
    both = threading.Barrier(2)

    def write(work: Any, path: Path, first: int, last: int) -> None:
        if len(written) < 2:
            both.wait(60)  # neither comes here before the other has a file of its own
        written.append(path.name.partition(".parquet")[0])
        usual(work, path, first, last)

    monkeypatch.setattr(job._Work, "write", write)
    found: list[Any] = []

    def work(number: int) -> None:
        found.append(run(made, tmp_path / "D", rank=(number, 2), **CUT))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who waits for whom at the end is chance
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert len(found) == 2 and found[0] == found[1] and found[0].shards == 4
    assert sorted(written) == [f"tokens-{n:05d}" for n in range(4)], "each by one of them"
    assert set(written[:2]) == {"tokens-00000", "tokens-00002"}, "they begin apart"
    assert content(tmp_path / "D") == whole
    assert [file.name for file in (tmp_path / "D").glob(".*")] == [".lock"]


def test_what_another_has_taken_is_waited_for_but_not_for_ever(
    made: Made, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(claims, "_SILENT_SECONDS", 0.05)
    folder = tmp_path / "D"
    folder.mkdir()
    (folder / "distill.json").write_bytes(whole["distill.json"])
    lock = WriterLock(folder, ".lock-00001")
    theirs = folder / "tokens-00001.parquet.1-0.part"
    theirs.write_bytes(b"of the other, at work")
    try:
        with (
            pytest.warns(UserWarning, match="waiting for file 1, of other processes"),
            pytest.raises(DatastoreLockedError, match="file 1: claimed by a process"),
        ):
            run(made, folder, **CUT)
        assert theirs.exists(), "a file of a process at work is left alone"
    finally:
        lock.release()
    run(made, folder, **CUT)
    assert content(folder) == whole


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", "distill.json.1f-0.part")])
def test_a_kill_before_the_plan_was_there(
    left: tuple[str, ...], made: Made, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "D"
    folder.mkdir()
    for name in left:
        (folder / name).write_bytes(b"{")
    run(made, folder, **CUT)
    assert content(folder) == whole


def test_two_that_begin_at_once_have_one_plan(made: Made, tmp_path: Path, monkeypatch: Any) -> None:
    """Of two, the second has what it left open from the first; what it was told is compared."""
    folder = tmp_path / "D"
    usual = job.begin

    def begin(path: Path, plan: Any, known: Any) -> Any:
        if not known:  # the other one is a moment earlier
            monkeypatch.setattr(job, "begin", usual)
            run(made, path, batch_size=4)
        return usual(path, plan, known)

    monkeypatch.setattr(job, "begin", begin)
    run(made, folder, batch_size=None)
    assert json.loads((folder / "distill.json").read_text())["batch_size"] == 4
    monkeypatch.setattr(job, "begin", begin)
    with pytest.raises(IncompatibleDatastoreError, match="batch_size: the data has 4, asked for 2"):
        run(made, tmp_path / "E")


def test_what_decides_over_the_neighbors_is_compared(made: Made, tmp_path: Path) -> None:
    store, text = made["stream"], made["text"]
    folder = tmp_path / "D"
    index = ExactIndex(store)
    run(made, folder, index=index.restricted(Filter(exclude_documents=[1])))
    assert (folder / "distill.json").read_text().count("filter") == 1
    other = a_text(LENGTHS)
    other.document_offsets = other.document_offsets.copy()
    other.document_offsets[2] += 3  # the same tokens, of other documents
    renamed = replace(text, hashes=np.roll(text.hashes, 1, axis=0))
    for change, words in (
        ({"index": index}, r"search: the data has 'exact, filter \w+', asked for 'exact'"),
        ({"index": index.restricted(Filter(exclude_documents=[2]))}, "search: the data has"),
        ({"index": index.restricted(Filter(rows=[1, 2]))}, "search: the data has"),
        ({"text": other, "allow_overlap": True}, "documents: the data has"),
        ({"text": renamed, "allow_overlap": True}, "documents: the data has"),
        ({"full_last_window": True}, "full_last_window: the data has False, asked for True"),
        ({"index": ExactIndex(store, refine=False)}, "asked for 'exact, not refined'"),
    ):
        with pytest.raises(IncompatibleDatastoreError, match=words):
            run(made, folder, **change)
    run(made, folder, index=index.restricted(Filter(exclude_documents=[text.names[1]])))
    owners = store.document_of(torch.arange(len(store)))
    only = set(store.values[:][owners != 1].tolist())
    assert {token for ids in rows(folder)["ids"] for token in ids} <= only


def test_plans_of_before_are_gone_on_with(made: Made, tmp_path: Path) -> None:
    run(made, tmp_path / "D", **CUT)
    place = tmp_path / "D" / "distill.json"
    plan = json.loads(place.read_text())
    del plan["documents"]
    place.write_text(json.dumps(plan))
    run(made, tmp_path / "D", **CUT)
    del plan["temperature"]
    place.write_text(json.dumps(plan))
    with pytest.raises(IncompatibleDatastoreError, match="temperature: the data has None"):
        run(made, tmp_path / "D", **CUT)


def test_on_a_full_disk_nothing_is_begun(made: Made, tmp_path: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("knnext.datastore.room.free_bytes", lambda path: 199 * 50)
        with pytest.raises(DatastoreFullError, match=r"keep fewer tokens \(top=, --top\)"):
            run(made, tmp_path / "D")
        assert not (tmp_path / "D").exists()
        run(made, tmp_path / "D", top=2)  # as it says
    assert DistillationData(tmp_path / "D").plan["top"] == 2


def test_searches_that_ranks_make_together_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="search each for itself: give an ExactIndex or FaissInd"):
        run(made, tmp_path / "D", index=ShardedIndex(made["stream"]))
    nothing = a_text([1])
    with pytest.raises(ValueError, match="holds fewer than two tokens"):
        run(made, tmp_path / "D", text=nothing, exclude="none")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DatastoreError, match="a folder is wanted, this is a file"):
        run(made, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("which", ["stream", "apart"])
def test_the_last_windows_are_full_where_that_is_asked_for(
    which: str, made: Made, tmp_path: Path
) -> None:
    store, other = made[which], a_text([30, 21, 50, 9] * 8, seed=7)
    options: dict[str, Any] = {"text": other, "exclude": "none", "full_last_window": True}
    run(made, tmp_path / "one", which, **options)
    run(made, tmp_path / "cut", which, **options, shard_tokens=20)
    assert len(list((tmp_path / "cut").glob("*.parquet"))) > 2
    scores = search_stream(
        made["model"], ExactIndex(store), other, k=12, full_last_window=True, **WINDOWS
    )
    usual = search_stream(made["model"], ExactIndex(store), other, k=12, **WINDOWS)
    assert scores.log_p_lm.tolist() != usual.log_p_lm.tolist()
    for name in ("one", "cut"):
        assert rows(tmp_path / name)["log_p_lm"] == scores.log_p_lm.tolist()
        assert rows(tmp_path / name)["log_p_knn"] == scores.log_p_knn(5.0).tolist()


def test_a_store_with_deleted_rows_and_one_that_changes(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made["stream"].path, tmp_path / "S")
    store = Datastore.open(tmp_path / "S")
    gone = store.document_names[2]
    store.delete([gone])
    store = Datastore.open(tmp_path / "S")
    done = run(made, tmp_path / "D", index=ExactIndex(store))
    assert done.excluded_documents == 4 and done.tokens == 199
    kept = set(store.values[:].tolist())
    assert {token for ids in rows(tmp_path / "D")["ids"] for token in ids} <= kept
    store.delete([store.document_names[0]])
    with pytest.raises(IncompatibleDatastoreError, match="datastore: the data has"):
        run(made, tmp_path / "D", index=ExactIndex(Datastore.open(tmp_path / "S")))
