"""`knnext explore` as a person has it: started, opened, typed into, clicked, dragged, ended."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason="the extra explore is not installed")
pytest.importorskip("uvicorn", reason="the extra explore is not installed")

from knnext.explore.session import Limit
from tests.explore.small import LMBDA, TEMPERATURE, TEXT, K, open_session
from tests.explore.test_session import scored
from tests.report.browser import css, errors, one, resize, settled, start_chromium, wait
from tests.report.test_page import OVERFLOW, SCROLLS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program and the address that it says."""
    mixture = ["--temperature", str(TEMPERATURE), "--lmbda", str(LMBDA), "--k", str(K)]
    command = [sys.executable, "-m", "knnext", "explore", str(folder / "store")]
    command += ["--model", str(folder / "model"), "--device", "cpu", *mixture, *options]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    watch = threading.Timer(600, process.kill)  # a server that says nothing must not hang a test
    watch.start()
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "Ctrl-C" in line:
                break
        found = re.search(r"http://\S+", said)
        assert found, said
        yield process, found[0]
    finally:
        watch.cancel()
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as (_, address):
        yield address


@pytest.fixture(scope="module")
def driver(address: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    driver = start_chromium(tmp_path_factory.mktemp("explore-browser"))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver: Any, address: str) -> Any:
    resize(driver, 1280)
    driver.get("about:blank")
    driver.get(address)
    return driver


IDLE = "document.body.getAttribute('aria-busy') !== 'true'"


def do(browser: Any, what: str, text: str = TEXT) -> None:
    """Type a text and press a button, until the answer is there."""
    field = one(browser, "#typed")
    field.clear()
    # A driver types no characters beyond the first plane.
    browser.execute_script(
        "const e = document.getElementById('typed'); e.value = arguments[0];"
        "e.dispatchEvent(new Event('input', { bubbles: true }))", text
    )  # fmt: skip
    one(browser, f"#{what}").click()
    wait(browser, IDLE)
    settled(browser)


def shown(browser: Any) -> float:
    return float(one(browser, ".sums").get_attribute("data-mixture"))


def put(browser: Any, name: str, value: str) -> None:
    field = one(browser, f"#{name}")
    field.clear()
    field.send_keys(value)
    settled(browser)


@pytest.fixture(scope="module")
def scores(folder: Path) -> Any:
    session = open_session(folder)
    return scored(session, TEXT, K)


def perplexity(scores: Any, temperature: float, lmbda: float, k: int) -> float:
    from knnext.evaluation import evaluate

    return evaluate(scores.truncate(k), temperature, lmbda).mixture.token


def test_the_browsers_perplexity_is_pythons(browser: Any, scores: Any) -> None:
    """As read, after a number is typed, and after each slider is dragged by hand."""
    from selenium.webdriver import ActionChains

    do(browser, "read")
    texts = [t.get_attribute("textContent") for t in css(browser, ".t")]
    assert len(texts) == scores.num_tokens
    assert shown(browser) == pytest.approx(perplexity(scores, TEMPERATURE, LMBDA, K), rel=1e-5)
    assert float(one(browser, ".sums").get_attribute("data-base")) == pytest.approx(
        float((-scores.log_p_lm.double().mean()).exp()), rel=1e-5
    )
    put(browser, "temperature", "0.31")
    put(browser, "lmbda", "0.85")
    put(browser, "k", "5")
    assert shown(browser) == pytest.approx(perplexity(scores, 0.31, 0.85, 5), rel=1e-5)
    before = css(browser, ".t")[7].get_attribute("class")
    for name, by in (("temperature", -50), ("lmbda", -60), ("k", 25)):
        slide = one(browser, f"#{name}-slide")
        ActionChains(browser).drag_and_drop_by_offset(slide, by, 0).perform()
        settled(browser)
    address = dict(re.findall(r"(temperature|lmbda|k)=([\d.e-]+)", browser.current_url))
    moved = float(address["temperature"]), float(address["lmbda"]), int(address.get("k", K))
    assert moved[0] != 0.31 and moved[1] != 0.85 and moved[2] != 5
    assert shown(browser) == pytest.approx(perplexity(scores, *moved), rel=1e-5)
    assert f"{shown(browser):.3g}"[:3] in one(browser, ".sums .value").text
    put(browser, "lmbda", "0")
    assert css(browser, ".t")[7].get_attribute("class") != before
    assert {t.get_attribute("class").split()[1] for t in css(browser, ".t")} == {"d0"}
    one(browser, "#as-tuned").click()
    settled(browser)
    assert shown(browser) == pytest.approx(perplexity(scores, TEMPERATURE, LMBDA, K), rel=1e-5)
    assert errors(browser) == []


def test_the_ends_of_the_settings_are_pythons_too(browser: Any, scores: Any, folder: Path) -> None:
    """Where weights underflow, log p does not; and where nothing is left, it is infinite."""
    raw = open_session(folder).read(TEXT, Limit(600))
    for temperature, lmbda, k in (
        (1e-7, 1.0, K), (1e-7, 1 - 1e-15, K), (1e9, 0.5, K), (1e-9, 0.5, 1),
        (1.0, 1.0, 1), (1.0, 0.0, K),
    ):  # fmt: skip
        told = browser.execute_script(
            "const of = new knnextPassages.Whole(arguments[0], null);"
            "const all = of.texts.map((_, i) => of.mix(i, 0, arguments[1]));"
            "return all.map((x) => (Number.isFinite(x) ? x : null));",
            raw, {"temperature": temperature, "lmbda": lmbda, "k": k},
        )  # fmt: skip
        near = scores.truncate(k)
        gaps = (near.distances[:, :1] - near.distances).double() / temperature
        hits = gaps.masked_fill(near.tokens != near.targets[:, None], -torch.inf)
        knn = hits.logsumexp(1) - gaps.logsumexp(1) + math.log(lmbda or 5e-324)
        base = near.log_p_lm.double() + (math.log1p(-lmbda) if lmbda < 1 else -math.inf)
        wanted = torch.logaddexp(knn, base) if lmbda else base
        assert told == [
            pytest.approx(x, rel=1e-5) if x > -math.inf else None for x in wanted.tolist()
        ]
    assert errors(browser) == []


def test_signs_that_cannot_be_seen_are_shown(browser: Any) -> None:
    """And those that turn the direction of what follows stand nowhere as they are."""
    do(browser, "read", "fox \u202e\u061c\u00ad\u200b\u0000 \u05d0 fox")
    text = one(browser, ".text").get_attribute("textContent")
    for code in ("202e", "61c", "ad", "200b"):
        assert f"⟨{code}⟩" in text and chr(int(code, 16)) not in text
    assert "␀" in text and "\u05d0" in text
    item = browser.execute_script(
        "const item = knnextExplorer.rowItem(arguments[0], true, ['share 1 %']);"
        "return [item.textContent, item.querySelectorAll('b').length]",
        {"before": "a\u202e", "token": "<b>", "after": "\u2067", "document": "x\u202etxt.exe"},
    )
    assert not set("\u202e\u2067") & set(item[0]) and "<b>" in item[0] and item[1] == 0


def test_a_text_that_is_too_much_is_told_so(browser: Any) -> None:
    do(browser, "read", "fox " * 200_000)
    assert "at most 524288 bytes" in one(browser, "#said").text
    (logged,) = errors(browser)
    assert "413" in logged
    put(browser, "tokens", "40")
    do(browser, "write", TEXT * 3)
    said = one(browser, "#said").text
    assert "its end was read" in said and "at most 16 are written" in said
    assert 2 <= len(css(browser, ".t")) <= 32


def test_a_click_explains_a_token(browser: Any, scores: Any) -> None:
    do(browser, "read")
    css(browser, ".t")[9].click()
    wait(browser, "document.querySelectorAll('#neighbors li.row').length > 0")
    rows = css(browser, "table.top tbody tr")
    assert len(rows) >= 8
    target = one(browser, "table.top tr.target")
    cells = target.find_elements("css selector", "td span")
    wanted = (
        float(scores.log_p_lm[9].exp()),
        float(scores.log_p_knn(TEMPERATURE)[9].exp()),
        float(scores.log_p(TEMPERATURE, LMBDA)[9].exp()),
    )
    for cell, p in zip(cells, wanted, strict=True):
        if p >= 0.001:
            assert float(cell.text) == pytest.approx(p, abs=6e-4)
    assert "ikeliest" in one(browser, ".why").text
    items = css(browser, "#neighbors li.row")
    assert len(items) == 6 and "distance" in items[0].text and ".txt" in items[0].text
    one(browser, "#more").click()
    wait(browser, f"document.querySelectorAll('#neighbors li.row').length === {K}")
    # What is moved is followed here too.
    put(browser, "k", "3")
    wait(browser, "document.querySelectorAll('#neighbors li.row').length === 3")
    assert "3 of 3 neighbors, 100 %" in one(browser, "#panel").text


def test_writing_side_by_side(browser: Any) -> None:
    put(browser, "tokens", "6")
    do(browser, "write", "the quick brown fox")
    names = [h.text for h in css(browser, ".passage h3")]
    assert names == ["With the neighbors", "The base LM alone"]
    counts = [len(block.find_elements("css selector", ".t")) for block in css(browser, ".text")]
    assert counts == [6, 6]
    boxes = [block.rect for block in css(browser, ".text")]
    assert boxes[1]["x"] > boxes[0]["x"] + boxes[0]["width"]
    for side in (0, 1):
        css(browser, ".text")[side].find_elements("css selector", ".t")[2].click()
        assert one(browser, "table.top tr.target").is_displayed()
        kinds = [
            row.find_elements("css selector", "td span") for row in css(browser, ".top tbody tr")
        ]
        values = [[cell.text for cell in row][(2, 0)[side]] for row in kinds]
        target = one(browser, "table.top tr.target").find_elements("css selector", "td span")
        own = target[(2, 0)[side]].text
        assert float(own) == max(float(v) for v in values if "·" not in v)  # why it was taken
    assert errors(browser) == []


def test_searching_the_store(browser: Any) -> None:
    do(browser, "nearest", "the quick brown")
    assert len(css(browser, "#hit-list li")) == 16
    assert "share" in one(browser, "#hit-list li").text
    do(browser, "occurrences", "fox jumps")
    note = one(browser, "#hits-note").text
    assert "to the letter" in note and len(css(browser, "#hit-list li")) > 0
    do(browser, "occurrences", "zzz qqq")
    assert "not in the datastore" in one(browser, "#hits-note").text
    # What the corpus holds is text, and no markup.
    do(browser, "nearest", "<script>document.title = 'owned'</script>")
    assert browser.title == "knnext explore"
    assert css(browser, "#hit-list b, #hit-list script") == []


def test_the_address_keeps_text_and_token(browser: Any) -> None:
    do(browser, "read")
    css(browser, ".t")[4].click()
    put(browser, "lmbda", "0.2")
    address, figure = browser.current_url, shown(browser)
    browser.get("about:blank")
    browser.get(address)
    wait(browser, "document.querySelector('.t[aria-pressed=true]')?.dataset.i === '4'")
    settled(browser)
    assert shown(browser) == figure
    assert one(browser, "#typed").get_attribute("value") == TEXT


def test_what_is_wrong_is_said(browser: Any) -> None:
    one(browser, "#read").click()
    assert "Type or paste" in one(browser, "#said").text
    do(browser, "read", "fox")
    assert len(css(browser, ".t")) >= 1
    put(browser, "tokens", "100000")
    one(browser, "#write").click()
    assert "from 1 to" in one(browser, "#said").text
    browser.execute_script("document.getElementById('said').textContent = ''")
    one(browser, "#typed").clear()
    assert errors(browser) == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_every_state_fits(browser: Any, width: int, dark: bool) -> None:
    resize(browser, width, 800, dark=dark)
    put(browser, "tokens", "3")
    for what in ("read", "write", "nearest", "occurrences"):
        do(browser, what, "the quick brown fox jumps")
        assert browser.execute_script(OVERFLOW) == [], what
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        if width > 600:
            assert browser.execute_script(SCROLLS) == [], what


@pytest.mark.parametrize(("width", "height"), [(400, 800), (360, 640), (768, 1024), (1280, 800)])
def test_the_text_that_was_read_is_on_the_screen(browser: Any, width: int, height: int) -> None:
    """Above what it is looked at with, where there is no room for both."""
    resize(browser, width, height)
    for what in ("read", "write", "nearest"):
        do(browser, what, "the quick brown fox jumps over the lazy dog")
        place = "#hit-list li" if what == "nearest" else ".text"
        top = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
        least, most = browser.execute_script(top, place), 0.8 * height
        assert 0 <= least < most, (what, least)
        if width < 800 and what != "nearest":
            assert browser.execute_script(top, "#gain") > least


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_told_so(folder: Path, ending: signal.Signals) -> None:
    """Also while a browser holds a connection, and nothing is left behind."""
    before = sorted(path.name for path in folder.rglob("*"))
    with served(folder) as (process, address):
        with urllib.request.urlopen(address, timeout=600) as page:
            assert b"knnext explore" in page.read()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address + "x", timeout=600)
        assert refused.value.code == 403
        process.send_signal(ending)
        out, _ = process.communicate(timeout=600)
        assert process.returncode == (0 if ending == signal.SIGINT else -signal.SIGTERM), out
        assert "Traceback" not in out
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(address, timeout=600)
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_port_that_is_taken(folder: Path, address: str) -> None:
    from knnext.explore.server import Server

    port = int(re.findall(r":(\d+)/", address)[0])
    with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}"):
        Server(open_session(folder), {}, port=port)
