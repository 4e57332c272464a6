"""The README's figure is drawn from committed results, and says what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import figure
from benchmarks.report.rows import Row, read


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


def test_the_readmes_table_has_the_fastest_rivals() -> None:
    """A rival that is slower than another of the same op says little."""
    _, rows = read(figure.SPEED)
    text = (figure.ROOT / "README.md").read_text(encoding="utf-8")
    row = r"^\| `(\w+)` \| [^|]+ \| ([\d.]+) \|(?: ([\d.]+))? \| ([\d.]+) \|$"
    table = re.findall(row, text, re.MULTILINE)
    assert [op for op, *_ in table] == ["knn_search", "knn_softmax", "knn_interpolate"]
    for op, *said in table:
        rivals = next(names for name, names, _ in figure.RIVALS if name == op)
        for queries, number in zip((1, 256, 1024), said, strict=True):
            found = figure.ratio(rows, op, rivals, queries)
            assert number == ("" if found is None else f"{found:.1f}"), (op, queries)


def test_a_file_that_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        figure.main(["--speed", str(tmp_path / "nowhere.json")])
    assert "nowhere.json" in capsys.readouterr().err
