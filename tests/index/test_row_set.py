"""Sets of rows against Python's own, however they are put together and asked."""

from __future__ import annotations

import random

import numpy as np
import pytest

from knnext.index import row_set
from knnext.index.queries import QueryGroup
from knnext.index.row_set import ALL_ROWS, AnyOf, Masked, RowSet, Runs, plan, split
from knnext.index.sharded_sets import labels_of, pack, unpack

ROWS = 300


def a_part(rng: random.Random) -> tuple[Runs | Masked, set[int]]:
    everything, keep = set(range(ROWS)), rng.random() < 0.5
    kind = rng.choice(["runs", "rows", "mask"])
    if kind == "runs":
        bounds = [sorted(rng.choices(range(ROWS + 1), k=2)) for _ in range(rng.choice([0, 1, 4]))]
        held = {row for a, b in bounds for row in range(a, b)}
        part: Runs | Masked = Runs.of([(a, b) for a, b in bounds], keep=keep)
    else:
        count = rng.choice([0, 1, 30, ROWS])
        held = set(rng.choices(range(ROWS), k=count))
        if kind == "rows":
            given = [*held, *list(held)[:3]]
            rng.shuffle(given)
            part = Runs.of_rows(np.array(given, dtype=np.int64), keep=keep)
        else:
            mask = np.zeros(ROWS, dtype=bool)
            mask[list(held)] = True
            part, keep = Masked(mask), True
    return part, held if keep else everything - held


def a_set(rng: random.Random) -> tuple[RowSet, set[int]]:
    parts = [a_part(rng) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    held = set(range(ROWS)).intersection(*(h for _, h in parts))
    return RowSet([part for part, _ in parts]), held


def members(answer: row_set.Answer, start: int, stop: int) -> set[int]:
    if isinstance(answer, bool):
        return set(range(start, stop)) if answer else set()
    assert answer.any() and not answer.all()  # else it would have been a plain answer
    return {start + int(row) for row in np.flatnonzero(answer)}


@pytest.mark.parametrize("seed", range(60))
def test_every_question_is_answered_as_by_a_set(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(row_set, "_FEW_RUNS", rng.choice([0, 64]))
    rows, held = a_set(rng)
    start, stop = sorted(rng.choices(range(ROWS + 1), k=2))
    if start < stop:
        assert members(rows.window(start, stop), start, stop) == held & set(range(start, stop))
    assert {int(row) for some in rows.numbers(ROWS) for row in some} == held
    some = np.array(sorted(rng.choices(range(ROWS), k=20)), dtype=np.int64)
    answer = rows.among(some)
    mask = np.full(20, answer) if isinstance(answer, bool) else answer
    assert [int(row) in held for row in some] == mask.tolist()
    assert rows.count(ROWS) == len(held)
    assert set(np.flatnonzero(rows.mask(ROWS)).tolist()) == held
    bits = np.unpackbits(rows.bits(ROWS), bitorder="little", count=ROWS)
    assert set(np.flatnonzero(bits).tolist()) == held
    other, more = a_set(rng)
    either = AnyOf([rows, other])
    if start < stop:
        window = either.window(start, stop)
        assert members(window, start, stop) == (held | more) & set(range(start, stop))
    if (run := rows.one_run()) is not None:
        inside = set(range(*run[:2]))
        assert held == (inside if run[2] else set(range(ROWS)) - inside)


@pytest.mark.parametrize("seed", range(30))
def test_a_union_of_many_that_share_what_they_begin_with(seed: int) -> None:
    rng = random.Random(seed)
    first = [[], [a_part(rng)], [a_part(rng), a_part(rng)]]
    made = [[*rng.choice(first), *(a_part(rng) for _ in range(rng.choice([0, 1, 1])))]]
    made += [[*rng.choice(first), a_part(rng)] for _ in range(rng.choice([1, 4, 9]))]
    either = AnyOf([RowSet([part for part, _ in parts]) for parts in made])
    everything = set(range(ROWS))
    held = set().union(*(everything.intersection(*(h for _, h in parts)) for parts in made))
    assert len(either.sets) <= len(made) and either.count(ROWS) == len(held)
    for start, stop in ((0, ROWS), (17, 100), (250, 251)):
        window = either.window(start, stop)
        assert members(window, start, stop) == held & set(range(start, stop))
    assert len(AnyOf([RowSet([Runs.of([(d, d + 1)])]) for d in range(50)]).sets) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_reads_what_is_wanted_once_and_nothing_else(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_set, "LONG_RUN", 8)
    rng = random.Random(seed)
    wanted, held = a_set(rng)
    step, most = rng.choice([7, 64, ROWS]), rng.choice([1, 10, ROWS])
    pieces = [(a, min(a + step, ROWS)) for a in range(0, ROWS, step)]
    read: list[int] = []
    for (start, stop), rows in plan(wanted, pieces, most):
        if rows is None:
            read += range(start, stop)
        else:
            assert 0 < len(rows) <= most and (start, stop) == (rows[0], rows[-1] + 1)
            assert (np.diff(rows) > 0).all()
            read += rows.tolist()
    assert sorted(read) == sorted(held)


def test_long_runs_are_told_from_scattered_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_set, "LONG_RUN", 3)
    mask = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1], dtype=bool)
    ranges, rows = split(mask, 100)
    assert ranges == [(103, 107)] and rows.tolist() == [100, 101, 108]
    assert mask.sum() == 7  # as it was


@pytest.mark.parametrize("seed", range(30))
def test_sets_travel_to_a_shard(seed: int) -> None:
    rng = random.Random(seed)
    made = [a_set(rng) for _ in range(rng.choice([1, 2, 5]))]
    groups = [QueryGroup(None, rows) for rows, _ in made]
    start, stop = sorted(rng.choices(range(ROWS + 1), k=2))
    words = pack(groups, start, stop)
    for rows, (_, held) in zip(unpack(words, stop - start), made, strict=True):
        inside = {row - start for row in held if start <= row < stop}
        assert set(np.flatnonzero(rows.mask(stop - start)).tolist()) == inside
    again = [QueryGroup(None, made[0][0])] * 9  # what is shared travels once
    assert len(pack(again, start, stop)) <= len(pack(again[:1], start, stop)) + 9 * 4


def test_queries_know_their_group() -> None:
    import torch

    groups = [
        QueryGroup(torch.tensor([1, 3]), ALL_ROWS),
        QueryGroup(torch.tensor([0, 2]), ALL_ROWS),
    ]
    assert labels_of(groups, 4).tolist() == [1, 0, 1, 0]
    assert labels_of([QueryGroup(None, ALL_ROWS)], 2).tolist() == [0, 0]
