"""The grid of searches against every exact rival."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from benchmarks import grid
from benchmarks.bench_knn_search import IMPLEMENTATIONS
from tests.benchmarks.test_rivals import threads

WORDS = ["--queries", "1", "3", "--dim", "32", "--k", "4", "--entries", "2000", "--threads", "1"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls by name, each of which takes the seconds set here; knnext's take one."""
    calls: Counter[str] = Counter()
    seconds = {"torch_chunked": 2.0, "faiss_flat": 30.0, grid.CODES: 0.5}

    def named(name: str) -> Any:
        real = IMPLEMENTATIONS[name]

        def prepare(data: Any) -> Callable[[], Any]:
            run = real.prepare(data)
            run.name = name  # type: ignore[attr-defined]
            return run

        return replace(real, prepare=prepare)

    def timed(run: Any) -> float:
        calls[run.name] += 1
        return seconds.get(run.name, 1.0)

    monkeypatch.setattr(grid, "IMPLEMENTATIONS", {name: named(name) for name in IMPLEMENTATIONS})
    monkeypatch.setattr(grid, "timed", timed)
    return calls


def test_ratios_to_knnext_of_each_shape(
    clock: Counter[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    out = tmp_path / "grid.json"
    rivals = ["--rivals", "torch_chunked", "faiss_flat", "--out", str(out)]
    with threads(1):
        rows = grid.main([*WORDS, *rivals])
    assert [row["Q"] for row in rows] == [1, 3] and json.loads(out.read_text())["rows"] == rows
    wanted = {"torch_chunked": 2, "faiss_flat": 30, grid.CODES: 0.5}
    assert all(row["times_knnext"] == wanted for row in rows)
    assert clock["faiss_flat"] == 2  # once a shape: so slow a rival is not run again
    assert clock["torch_chunked"] == clock[grid.OURS] == 2 * (1 + grid.ROUNDS)
    # Codes are knnext too: that they are faster is no shape lost.
    assert "2 of 2 shapes faster than every exact rival" in capsys.readouterr().out


def test_a_search_that_finds_others_is_an_error(
    clock: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "recall", lambda data, result: 0.99)
    with threads(1), pytest.raises(SystemExit, match=r"knnext_sqnorms .* recall 0\.9900"):
        grid.main([*WORDS, "--rivals", "torch_chunked"])


def test_keys_of_many_dimensions_are_fewer() -> None:
    found = list(grid.shapes(grid.parse(["--dtype", "float32", "--dim", "64", "4096"])))
    assert {(shape.dim, shape.entries) for shape in found} == {(64, 200_000), (4096, 65_536)}
    keys = [(shape.dim, shape.dtype) for shape in found]
    assert len([*groupby(keys)]) == len({*keys})  # made once
