"""The findings in the docs are what the experiments' files hold: no number is typed from memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knnext.experiments.catalog import NAMES
from knnext.experiments.lab.results import load_result
from knnext.experiments.report import markdown_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
TEXTS = [ROOT / "README.md", ROOT / "docs" / "findings.md", *sorted(RESULTS.glob("*/README.md"))]
#: A figure with its interval, such as `-9.5 % [-11.3, -7.7]`.
FIGURE = re.compile(r"([-+]?\d+(?:\.\d+)?)(?: %)? ?\[([-+]?[\d.]+), ([-+]?[\d.]+)\]")


def held(value: Any) -> Iterator[tuple[str, ...]]:
    """Every figure with its interval of a result, as texts would say it."""
    if isinstance(value, str):
        yield from FIGURE.findall(value)
    elif isinstance(value, list):
        for part in value:
            yield from held(part)
    elif isinstance(value, dict):
        ends = [value.get(name) for name in ("value", "high", "low")]
        if all(isinstance(end, float) for end in ends):
            changes = [100 * math.expm1(-end) for end in ends]
            yield tuple(f"{change:.2f}" for change in changes)
        for part in value.values():
            yield from held(part)


@pytest.fixture(scope="module")
def known() -> set[tuple[str, ...]]:
    files = RESULTS.glob("*/*.json")
    return {f for path in files for f in held(json.loads(path.read_text(encoding="utf-8")))}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_figure_is_of_a_result(path: Path, known: set[tuple[str, ...]]) -> None:
    text = " ".join(path.read_text(encoding="utf-8").replace("−", "-").split())
    figures = FIGURE.findall(text)
    assert [figure for figure in figures if figure not in known] == []
    assert figures or path.name == "README.md"  # or nothing was looked at


def test_the_search_for_figures_finds_a_wrong_one(known: set[tuple[str, ...]]) -> None:
    assert FIGURE.findall("a -17.4 % [-23.1, -12.0] b") == [("-17.4", "-23.1", "-12.0")]
    assert ("-17.4", "-23.1", "-12.0") in known
    assert ("-17.4", "-23.1", "-12.1") not in known


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/report.md")), ids=lambda p: p.parent.name)
def test_the_table_of_claims_is_that_of_the_files(path: Path) -> None:
    found = {n: load_result(p) for n in NAMES if (p := path.parent / f"{n}.json").exists()}
    table = path.read_text(encoding="utf-8").partition("\n\n")[2]
    assert table.strip() == markdown_table(found).strip()
    assert {p.stem for p in path.parent.glob("*.png")} == set(found)
