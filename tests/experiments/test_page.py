"""The experiments' page in a browser: all of it can be reached and read, wide and narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from knnext.experiments.report import write_report
from tests.report.browser import css, errors, resize, start_chromium
from tests.report.test_page import CONTRAST, OVERFLOW

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "smollm2-techdocs"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("experiments")
    for path in RESULTS.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    page, _ = write_report(folder, say=lambda line: None)
    driver = start_chromium(folder)
    driver.get(page.as_uri())
    yield driver
    driver.quit()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_all_of_it_can_be_reached_and_read(browser: Any, width: int, dark: bool) -> None:
    resize(browser, width, 900, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # The tables of all figures scroll within themselves, by hand or key.
    beside = OVERFLOW.replace("box.width > 1", "!e.closest('.scroll') && box.width > 1")
    assert beside != OVERFLOW and browser.execute_script(beside) == []
    for table in css(browser, ".scroll"):
        assert table.get_attribute("tabindex") == "0"
        names = [table.get_attribute(f"aria-{name}") for name in ("label", "labelledby")]
        assert table.get_attribute("role") == "region" and any(names)
    assert browser.execute_script(CONTRAST, False) == []
    assert len(browser.execute_script(CONTRAST, True)) > 100
    # A narrow page has a card a claim, in which each cell says its heading.
    cells = css(browser, "table.claims tbody tr:first-child td")
    assert len(cells) == 4 and all(cell.is_displayed() for cell in cells)
    label = "return getComputedStyle(arguments[0], '::before').content"
    assert browser.execute_script(label, cells[2]) == ('"ours"' if width == 400 else "none")
    assert errors(browser) == []


def test_links_lead_somewhere_and_pictures_have_words(browser: Any) -> None:
    broken = browser.execute_script(
        "return [...document.querySelectorAll('a')].map((a) => a.getAttribute('href'))"
        ".filter((href) => !document.querySelector(href))"
    )
    assert broken == []
    pictures = css(browser, "figure img")
    assert len(pictures) == len(list(RESULTS.glob("*.png")))
    for picture in pictures:
        assert len(picture.get_attribute("alt")) > 40
        assert browser.execute_script("return arguments[0].naturalWidth", picture) > 800
