"""The README's figure is drawn from committed results, and says what they say."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import figure, grid
from benchmarks.report.rows import Row, read

GRID = figure.ROOT / "benchmarks" / "results" / "grid" / "cpu-2026-11-29.json"


def row(implementation: str, seconds: float, queries: int = 1, dim: int = 1024) -> Row:
    facts = {"Q": queries, "N": 9, "D": dim, "k": 4, "dtype": "float16", "keys": "gaussian"}
    return Row("knn_search", implementation, "cpu", seconds, facts)


def test_the_fastest_rival_of_the_same_shape_counts() -> None:
    rows = [
        *(row("knnext", 2.0, dim=64), row("knnext", 1.0), row("knnext", 8.0, queries=2)),
        *(row("a", 5.0), row("b", 3.0), row("c", 0.1), row("b", 0.2, dim=64)),
    ]
    assert figure.ratio(rows, "knn_search", ("a", "b"), 1) == 3.0
    assert figure.ratio(rows, "knn_search", ("a", "b"), 2) is None
    assert figure.ratio(rows, "knn_softmax", ("a",), 1) is None


def test_changes_are_those_of_the_experiment() -> None:
    result = json.loads(figure.QUALITY.read_text(encoding="utf-8"))
    exact, real, faiss = figure.changes(result)
    assert all(change.low < change.value < change.high < 0 for change in (exact, real, faiss))
    assert exact.perplexity < real.perplexity < faiss.perplexity
    result["rows"][1]["change"] = "much"
    with pytest.raises(ValueError, match="no change with an interval in 'much'"):
        figure.changes(result)


def test_the_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    figure.main(["--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out == f"{out}\n"
    assert figure.PICTURE.is_file(), "the one that the repository shows"


def readme() -> str:
    return (figure.ROOT / "README.md").read_text(encoding="utf-8")


def speed_table() -> dict[str, list[str]]:
    """Cells of each op's row: its rivals, then one for each of 1, 16, 64 and 1024 queries."""
    rows = re.findall(r"^\| `(knn_\w+)` \|(.+)\|$", readme().partition("## Speed")[2], re.MULTILINE)
    return {op: [cell.strip() for cell in cells.split("|")] for op, cells in rows}


def test_the_readmes_searches_are_those_of_the_grid() -> None:
    """All exact rivals at one shape, the nearest first; and how many shapes are lost."""
    names = {
        "SVS": "svs_flat",
        "ScaNN": "scann_brute_force",
        "FAISS float16": "faiss_sq_fp16",
        "usearch": "usearch_exact",
        "FAISS flat": "faiss_flat",
    }
    rows = json.loads(GRID.read_text(encoding="utf-8"))["rows"]
    rivals, *cells, last = speed_table()["knn_search"]
    assert rivals.split("; ") == [*names] and last == ""
    shape = {"N": 200_000, "D": 1024, "k": 1024, "dtype": "float16"}
    for queries, cell in zip((1, 16, 64), cells, strict=True):
        [row] = [r for r in rows if {**r, **shape, "Q": queries} == r]
        found = [row["times_knnext"][name] for name in names.values()]
        assert cell.split("; ") == [f"{ratio:.2g}" for ratio in found], queries
    nearest = [
        min(ratio for name, ratio in row["times_knnext"].items() if name != grid.CODES)
        for row in rows
    ]
    won = sum(ratio >= 1 for ratio in nearest)
    said = f"Of {len(rows)} shapes it is the fastest exact search at {won}, by "
    assert f"{said}{statistics.median(nearest):.1f} in the median" in readme()


def test_the_readmes_table_has_the_fastest_rivals() -> None:
    """A rival that is slower than another of the same op says little."""
    _, rows = read(figure.SPEED)
    table = speed_table()
    assert [*table] == ["knn_search", "knn_softmax", "knn_interpolate"]
    for op in ("knn_softmax", "knn_interpolate"):
        rivals = next(names for name, names, _ in figure.RIVALS if name == op)
        for queries, number in zip((1, 16, 64, 1024), table[op][1:], strict=True):
            found = figure.ratio(rows, op, rivals, queries)
            assert number == ("" if found is None else f"{found:.1f}"), (op, queries)


def test_a_file_that_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        figure.main(["--speed", str(tmp_path / "nowhere.json")])
    assert "nowhere.json" in capsys.readouterr().err
