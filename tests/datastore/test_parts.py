"""A datastore that several processes build: the bytes of one, whatever the cut, and who died."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnext.corpus import TokenizedDocuments
from knnext.datastore import (
    Datastore,
    DatastoreError,
    DatastoreLockedError,
    IncompatibleDatastoreError,
    UnfinishedDatastoreError,
    build_job,
    claims,
    parts,
)
from knnext.datastore.build import build_datastore
from knnext.lm.hidden_states import hidden_states
from tests.datastore.parted import make_parts
from tests.datastore.streams import LENGTHS, WINDOWS, check_same, stream
from tests.launch import ended, processes
from tests.lm.tiny_models import tiny


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_parts_have_the_bytes_of_one_process(
    tokenizer: Any, text: TokenizedDocuments, whole: Datastore, tmp_path: Path, count: int
) -> None:
    """Whatever the order; the last joins, and nothing is copied. With 16 some are empty."""
    order = [*range(2, count + 1), 1]
    store = make_parts(tokenizer, text, tmp_path / "store", order, count)
    check_same(store, whole)
    assert store.meta.parts is not None and len(store.meta.parts) == count
    files = {file.name for file in (tmp_path / "store").iterdir() if file.is_file()}
    documents = {"document-starts.bin", "document-names.jsonl", "document-hashes.bin"}
    assert files == {"meta.json", ".lock", *documents}
    rows = [len(Datastore.open(tmp_path / "store" / part.folder)) for part in store.meta.parts]
    assert rows == [part.rows for part in store.meta.parts] and (0 in rows) == (count == 16)


@pytest.mark.parametrize(
    ("windows", "lengths"),
    [
        ({"block_size": 16, "stride": 16, "batch_size": 1}, LENGTHS),
        ({"block_size": 9, "stride": 2, "batch_size": 5}, [30, 1, 50]),
        ({"block_size": 64, "stride": 32, "batch_size": 8}, [20]),  # one batch
        ({"block_size": 16, "stride": 8, "batch_size": 2}, [1]),  # no row
    ],
)
def test_other_grids(
    tokenizer: Any, tmp_path: Path, windows: dict[str, Any], lengths: list[int]
) -> None:
    text = stream(lengths, hashed=False)
    model = tiny("gpt2")
    whole = build_datastore(model, tokenizer, text, tmp_path / "whole", **windows)
    for count in (3, 7):
        path = tmp_path / str(count)
        check_same(build_datastore(model, tokenizer, text, path, parts=count, **windows), whole)


def test_parts_whose_shards_are_small(
    tokenizer: Any, text: TokenizedDocuments, whole: Datastore, tmp_path: Path, monkeypatch: Any
) -> None:
    """Shards end inside the parts, too; every way to read goes across them."""
    from knnext.datastore import meta

    monkeypatch.setattr(meta, "_SHARD_BYTES", 11 * 64)
    store = make_parts(tokenizer, text, tmp_path / "store", [1, 2, 3], 3)
    check_same(store, whole)
    rows = [shard.rows for shard in store.meta.shards]
    assert max(rows) == 11 and len(rows) == sum(-(-p.rows // 11) for p in store.meta.parts or ())
    picked = torch.tensor([[200, 0], [66, 67]])
    assert torch.equal(store.keys[picked], whole.keys[picked])
    assert torch.equal(store.document_of(picked), whole.document_of(picked))
    assert [first for first, _ in store.keys.pieces(1000)][:2] == [0, 11]


@pytest.mark.parametrize("alone", [True, False])
def test_a_stopped_part_goes_on(
    tokenizer: Any,
    text: TokenizedDocuments,
    whole: Datastore,
    tmp_path: Path,
    alone: bool,
    monkeypatch: Any,
) -> None:
    """By its number, or by whoever shares the rest; committed rows are not computed again."""
    path, begun = tmp_path / "store", []

    def breaking(*args: Any, **kwargs: Any) -> Iterator[Any]:
        begun.append(kwargs["start"])
        for i, batch in enumerate(hidden_states(*args, **kwargs)):
            if i == 2:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_job, "hidden_states", breaking)
        make_parts(tokenizer, text, path, [2], 3)
    with pytest.raises(UnfinishedDatastoreError, match=r"of its 3 parts 0 are whole; missing: 1-3"):
        Datastore.open(path)
    seen = Datastore.open(path, allow_unfinished=True)
    assert len(seen) == 0 and "0 of 3 whole, of 201 entries" in seen.describe()
    with pytest.raises(UnfinishedDatastoreError, match=r"--part 1/3 and so on, .*--parts 3"):
        Datastore.join(path)
    with monkeypatch.context() as patch:
        patch.setattr(build_job, "hidden_states", lambda *a, **k: breaking_never(begun, *a, **k))
        if alone:
            store = make_parts(tokenizer, text, path, [2, 1, 3], 3)
        else:  # without a word of parts, as they were begun
            store = build_datastore(tiny("gpt2"), tokenizer, text, path, **WINDOWS)
    check_same(store, whole)
    assert begun[0] < begun[1 if alone else 2] and len(begun) == 4


def test_ranks_of_another_number_go_on(
    tokenizer: Any, text: TokenizedDocuments, whole: Datastore, tmp_path: Path, monkeypatch: Any
) -> None:
    """In as many parts as the build was begun in, which are eight a rank, or all batches."""
    path, model = tmp_path / "store", tiny("gpt2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_job, "PARTS_PER_RANK", 2)
        patch.setattr(build_job.BuildJob, "write_part", interrupted)
        build_datastore(model, tokenizer, text, path, rank=(1, 3), **WINDOWS)
    store = build_datastore(model, tokenizer, text, path, rank=(0, 2), **WINDOWS)
    check_same(store, whole)
    assert store.meta.parts is not None and len(store.meta.parts) == 6
    other = build_datastore(model, tokenizer, text, tmp_path / "all", rank=(0, 2), **WINDOWS)
    assert other.meta.parts is not None and len(other.meta.parts) == 13  # batches


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def breaking_never(begun: list[int], *args: Any, **kwargs: Any) -> Any:
    begun.append(kwargs["start"])
    return hidden_states(*args, **kwargs)


def test_another_build_is_refused_by_name(
    tokenizer: Any, text: TokenizedDocuments, whole: Datastore, tmp_path: Path
) -> None:
    model, other = tiny("gpt2"), copy.deepcopy(tiny("gpt2"))
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.add_(1e-3)
    path = tmp_path / "store"
    make_parts(tokenizer, text, path, [1], 3)
    changed = copy.deepcopy(text)
    changed.tokens[5] = 9
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (other, text, {}, r"model_revision: .*differ in weights"),
        (model, changed, {}, "tokens: datastore has"),
        (model, text, {"stride": 4}, "stride: datastore has 8, asked for 4"),
        (model, text, {"batch_size": 1}, "batch_size: datastore has 2, asked for 1"),
        (model, text, {"key_layer": "ffn"}, "key_layer: datastore has 'att', asked for 'ffn'"),
        (model, text, {"key_dtype": torch.float32}, "dtype"),
        (model, text, {"part": (1, 4)}, "parts: datastore has 3, asked for 4"),
        (model, text, {"part": None, "parts": 2}, "parts: datastore has 3, asked for 2"),
    ]

    def refused() -> None:
        for wrong, tokenized, options, message in cases:
            every = {"part": (2, 3), **WINDOWS, **options}
            with pytest.raises(IncompatibleDatastoreError, match=message):
                build_datastore(wrong, tokenizer, tokenized, path, **every)

    refused()
    make_parts(tokenizer, text, path, [2, 3], 3)
    refused()  # of what is joined, too
    with pytest.raises(ValueError, match="goes on with what other"):
        build_datastore(model, tokenizer, text, path, resume=False, **WINDOWS)
    check_same(build_datastore(model, tokenizer, text, path, **WINDOWS), whole)
    with pytest.raises(DatastoreError, match=r"joined from 3 parts.*Datastore\.merge"):
        Datastore.create(path, 32, resume=True)


@pytest.mark.parametrize("number", [0, -1, 4])
def test_parts_are_counted_from_one(
    tokenizer: Any, text: TokenizedDocuments, tmp_path: Path, number: int
) -> None:
    hint = "task 0 of 3 makes part 1/3" if number == 0 else "want 1/3 to 3/3"
    with pytest.raises(ValueError, match=rf"part: got {number}/3.*{hint}"):
        make_parts(tokenizer, text, tmp_path / "store", [number], 3)
    assert not (tmp_path / "store").exists()


def test_one_process_and_parts_do_not_mix(
    tokenizer: Any, text: TokenizedDocuments, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    with pytest.raises(DatastoreError, match="does not exist"):
        Datastore.join(path)
    build_datastore(tiny("gpt2"), tokenizer, text, path, **WINDOWS)
    finished = make_parts(tokenizer, text, path, [1], 3)  # is opened as it is
    assert finished.path == path and finished.meta.parts is None
    with pytest.raises(IncompatibleDatastoreError, match="stride: datastore has 8, asked for 4"):
        make_parts(tokenizer, text, path, [1], 3, stride=4)
    (path / "meta.json").rename(path / "build.json")
    with pytest.raises(DatastoreError, match="one process has begun a datastore there"):
        make_parts(tokenizer, text, path, [1], 3)
    (path / "build.json").rename(path / "meta.json")
    with pytest.raises(DatastoreError, match="built by one process, there is nothing to join"):
        Datastore.join(path)
    with pytest.raises(DatastoreError, match=r"not empty.*'store'"):
        make_parts(tokenizer, text, tmp_path, [1], 3)


# Processes


def workers(*commands: list[str]) -> Any:
    program = [sys.executable, "-m", "tests.datastore.parts_worker"]
    return processes(*([*program, *words] for words in commands))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["9", "join"])
def test_a_killed_process_costs_what_it_had_not_committed(
    whole: Datastore, tmp_path: Path, where: str
) -> None:
    """kill -9 of a process alone; the same command goes on, in two side by side."""
    folder = str(tmp_path / "store")
    with workers([folder, "0", "1", "kill", where]) as [first]:
        assert ended(first)[0] == -signal.SIGKILL
    with pytest.raises(UnfinishedDatastoreError):
        Datastore.open(folder)
    with workers(*([folder, str(rank), "2"] for rank in range(2))) as begun:
        for process in begun:
            code, _, err = ended(process)
            assert code == 0, err
    check_same(Datastore.open(folder), whole)


@pytest.mark.slow
def test_whoever_waits_takes_over_from_a_process_that_dies(
    whole: Datastore, tmp_path: Path
) -> None:
    folder = str(tmp_path / "store")
    with workers([folder, "0", "2", "stop", "2"], [folder, "1", "2"]) as [first, second]:
        assert second.stderr is not None
        for line in second.stderr:
            if "waiting for part" in line:
                break
        assert first.poll() is None
        os.killpg(first.pid, signal.SIGKILL)
        code, _, err = ended(second)
        assert code == 0, err
    check_same(Datastore.open(folder), whole)


# Reading


def test_a_claimed_part_is_left_to_its_process_and_waited_for(
    tokenizer: Any, text: TokenizedDocuments, whole: Datastore, tmp_path: Path, monkeypatch: Any
) -> None:
    """What a process holds is taken by nobody; when it ends, however, by whoever waits."""
    path = tmp_path / "store"
    make_parts(tokenizer, text, path, [3], 3)
    (path / "part-00002").mkdir()
    held = claims.WriterLock(path / "part-00002")
    with pytest.raises(DatastoreLockedError):
        make_parts(tokenizer, text, path, [2], 3)
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            held.release()  # as the kernel does when the process dies

    monkeypatch.setattr(claims.time, "sleep", sleep)
    with pytest.warns(UserWarning, match="waiting for part 2, of other processes"):
        store = build_datastore(tiny("gpt2"), tokenizer, text, path, parts=3, **WINDOWS)
    assert len(looks) == 3
    check_same(store, whole)


def test_nobody_waits_for_a_part_that_stands_still(
    tokenizer: Any, text: TokenizedDocuments, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "store"
    make_parts(tokenizer, text, path, [1], 2)
    (path / "part-00002").mkdir()
    held = claims.WriterLock(path / "part-00002")
    monkeypatch.setattr(claims, "_SILENT_SECONDS", 0.0)
    monkeypatch.setattr(claims, "_LOOK_SECONDS", 0.01)
    try:
        with (
            pytest.warns(UserWarning, match="waiting"),
            pytest.raises(
                DatastoreLockedError, match=r"part 2: claimed .* End it, and run the same"
            ),
        ):
            build_datastore(tiny("gpt2"), tokenizer, text, path, parts=2, **WINDOWS)
    finally:
        held.release()


def test_without_locks_nothing_is_shared(
    tokenizer: Any, text: TokenizedDocuments, whole: Datastore, tmp_path: Path, monkeypatch: Any
) -> None:
    """By its number each process can still make its own."""
    import errno
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / "store"
    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(UserWarning, match="no lock against"),
        pytest.raises(DatastoreError, match=r"has no locks .*as --part 3/64"),
    ):
        build_datastore(tiny("gpt2"), tokenizer, text, path, parts=2, **WINDOWS)
    with pytest.warns(UserWarning, match="no lock against"):
        store = make_parts(tokenizer, text, path, [1, 2], 2)
    check_same(store, whole)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (8, 3), (2, 4), (64, 8)])
def test_ranks_begin_apart_and_go_through_all(count: int, size: int) -> None:
    orders = [claims.in_turn(count, rank, size) for rank in range(size)]
    assert all(sorted(order) == [*range(1, count + 1)] for order in orders)
    assert len({order[0] for order in orders}) == min(count, size)


@pytest.mark.parametrize("count", [1, 3, 10, 64])
def test_cuts_are_near_equal_and_at_batches(count: int) -> None:
    ends = np.cumsum(np.random.default_rng(0).integers(1, 9, 50))
    found = parts.cut(ends, count)
    rows = np.cumsum([part.rows for part in found])
    assert len(found) == count and rows[-1] == ends[-1] and {*rows} <= {0, *ends}
    batches = np.diff(np.searchsorted(ends, rows, side="right"), prepend=0)
    assert batches.max() - batches.min() <= 1
