"""The tutorials run as they stand, in a folder of their own, and are pages of the site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import CONF, DOCS

TUTORIALS = DOCS / "tutorials"


def run(name: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(TUTORIALS / f"{name}.py"), str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DOCS.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def perplexities(out: str) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in re.findall(r"([\d.]+) -> ([\d.]+)", out)]


def test_every_tutorial_is_tested_and_reached() -> None:
    names = {path.stem for path in TUTORIALS.glob("*.py")}
    source = Path(__file__).read_text(encoding="utf-8")
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert names
    for name in names:
        assert f'run("{name}"' in source and f"\ntutorials/{name}\n" in index, name


@pytest.mark.parametrize("path", sorted(TUTORIALS.glob("*.py")), ids=lambda path: path.stem)
def test_a_page_has_all_of_the_script(path: Path) -> None:
    page = CONF.tutorial_page(path)
    assert page.startswith("# ") and page.count("```") % 2 == 0
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert line in page
    for link in re.findall(r"\]\(([\w./-]+)\)", page):
        place = TUTORIALS / link
        assert place.exists() or place.with_suffix(".py").exists(), link


def test_eval_loop(tmp_path: Path) -> None:
    out = run("eval_loop", tmp_path)
    ((before, after),) = perplexities(out)
    assert before == 500 and after < 15
    assert "the same: True" in out and "finds itself: [0, 1, 2, 3, 4]" in out


def test_temperature(tmp_path: Path) -> None:
    low, best, high = perplexities(run("temperature", tmp_path))
    assert best[1] <= low[1] < best[0] and best[1] < high[1] < best[0]
    assert (tmp_path / "temperature.png").stat().st_size > 10_000


def test_larger_than_memory(tmp_path: Path) -> None:
    out = run("larger_than_memory", tmp_path)
    assert out.count("True") == 3 and "False" not in out
    assert "streamed" in out and "by eight-bit codes" in out


@pytest.mark.slow
def test_own_folder(tmp_path: Path) -> None:
    for _ in range(2):  # the second time the datastore is there
        ((before, after),) = perplexities(run("own_folder", tmp_path))
        assert after < before
