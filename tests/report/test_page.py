"""The report's page in a browser: clicked, typed, dragged, wide and narrow, light and dark."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from knnext.report import Report, write_report
from tests.report.browser import css, errors, focus_order, one, resize, settled, start_chromium
from tests.report.browser import wait as wait_for
from tests.report.test_report import report, scores, store, tokenizer

__all__ = ["report", "scores", "store", "tokenizer"]  # fixtures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def driver(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("browser")
    path = write_report(folder / "report.html", report)
    driver = start_chromium(folder)
    driver.address = path.as_uri()
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver: Any) -> Any:
    """The page as it opens, in a wide window."""
    resize(driver, 1280)
    driver.get("about:blank")
    driver.get(driver.address)
    return driver


@pytest.fixture
def data(report: Report) -> Any:
    assert report.explorer is not None
    return report.explorer


def chosen(browser: Any) -> int:
    return int(one(browser, ".t[aria-pressed=true]").get_attribute("data-i"))


def perplexity(lm: list[float], knn: list[float | None], lmbda: float) -> float:
    p = [
        (1 - lmbda) * math.exp(a) + lmbda * (0 if b is None else math.exp(b))
        for a, b in zip(lm, knn, strict=True)
    ]
    return math.exp(-sum(map(math.log, p)) / len(p))


def shown(browser: Any) -> float:
    return float(one(browser, ".sums").get_attribute("data-mixture"))


def test_click_shows_the_neighbors(browser: Any, data: Any) -> None:
    excerpt, spans = data["excerpts"][0], data["spans"]
    near = excerpt["systems"][0]["near"]
    for i in (0, 17, 60):
        css(browser, ".t")[i].click()
        target = excerpt["targets"][i]
        wait_for(browser, "document.querySelectorAll('#neighbors li').length")
        items = css(browser, "#neighbors li")
        assert len(items) == len(near[i]) // 3 > 0
        assert chosen(browser) == i
        span = spans[near[i][0]]
        assert data["documents"][span[3]] in items[0].text
        hits = [len(item.find_elements("css selector", "mark.hit")) for item in items]
        assert hits == [int(spans[s][1] == target) for s in near[i][0::3]]
        assert f"{near[i][1]:.4g}"[:4] in items[0].text
        base = math.exp(excerpt["lm"][i])
        assert abs(float(one(browser, ".probs dd.num").text) - base) < 6e-4


def test_keyboard_moves_and_chooses(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    css(browser, ".t")[3].click()
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    active = browser.switch_to.active_element
    assert active.get_attribute("data-i") == "4"
    assert active.get_attribute("aria-pressed") == "true"
    assert [t.get_attribute("data-i") for t in css(browser, ".t[tabindex='0']")] == ["4"]
    active.send_keys(Keys.ARROW_DOWN)
    below = browser.switch_to.active_element
    assert int(below.get_attribute("data-i")) > 4
    below.send_keys(Keys.ENTER)
    assert "nats" in one(browser, "#status").get_attribute("textContent")
    below.send_keys("l")
    assert "−" in one(browser, "#panel .delta strong").text
    # Tab reaches every control once, and the text with one stop.
    order = focus_order(browser, 14)
    wanted = ["excerpt", "system", "against", "gain", "loss", "find", "lmbda-slide", "lmbda"]
    assert [name for name in order if name in wanted] == wanted
    assert sum(name.startswith("t d") for name in order) == 1


def test_buttons_and_excerpts(browser: Any, data: Any) -> None:
    first, (system, _) = data["excerpts"][0], data["systems"]
    gains = [
        (-math.inf if b is None and system["lmbda"] == 1 else
         math.log((1 - system["lmbda"]) * math.exp(a)
                  + system["lmbda"] * (0 if b is None else math.exp(b)))) - a
        for a, b in zip(first["lm"], first["systems"][0]["knn"], strict=True)
    ]  # fmt: skip
    one(browser, "#loss").click()
    assert gains[chosen(browser)] == pytest.approx(min(gains))
    one(browser, "#gain").click()
    assert gains[chosen(browser)] == pytest.approx(max(gains))
    options = css(browser, "#excerpt option")
    assert len(options) == len(data["excerpts"]) > 1
    options[1].click()
    assert len(css(browser, ".t")) == len(data["excerpts"][1]["targets"])
    assert chosen(browser) == data["excerpts"][1]["start"]


def test_the_address_leads_to_a_token(browser: Any, driver: Any) -> None:
    css(browser, "#excerpt option")[1].click()
    css(browser, ".t")[21].click()
    one(browser, "#system").find_elements("css selector", "option")[1].click()
    settled(browser)
    address, figure = browser.current_url, shown(browser)
    assert "token=22" in address and "excerpt=2" in address and "system=2" in address
    browser.get("about:blank")
    browser.get(address)
    assert (chosen(browser), shown(browser)) == (21, figure)
    assert one(browser, "#excerpt").get_attribute("value") == "1"
    assert one(browser, "#system").get_attribute("value") == "1"
    # Another excerpt is in the address at once: it leads there too.
    css(browser, "#excerpt option")[0].click()
    assert "excerpt=1" in browser.current_url
    # An address that is changed by hand is followed, and nonsense is passed over.
    browser.execute_script("location.hash = '#excerpt=1&token=3'")
    wait_for(browser, "document.querySelector('.t[aria-pressed=true]')?.dataset.i === '2'")
    browser.execute_script("location.hash = '#excerpt=99&token=-1&lmbda=7&system=x'")
    wait_for(browser, "document.querySelectorAll('.t[aria-pressed=true]').length === 1")
    assert errors(browser) == []


def test_search_in_the_page(browser: Any, data: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    texts = ["".join(excerpt["texts"]).lower() for excerpt in data["excerpts"]]
    count = sum(text.count("neighbor is") for text in texts)
    field = one(browser, "#find")
    field.send_keys("Neighbor is")
    assert one(browser, "#found").text == f"1 of {count}" and count > 1
    found = "".join(t.get_attribute("textContent") for t in css(browser, ".t.found"))
    assert "neighbor is" in found
    before = (one(browser, "#excerpt").get_attribute("value"), chosen(browser))
    field.send_keys(Keys.ENTER)
    assert one(browser, "#found").text == f"2 of {count}"
    assert before != (one(browser, "#excerpt").get_attribute("value"), chosen(browser))
    field.send_keys("zzz")
    assert one(browser, "#found").text == "not found"
    assert css(browser, ".t.found") == []


def test_lambda_follows_hand_and_number(browser: Any, data: Any) -> None:
    from selenium.webdriver import ActionChains

    excerpt = data["excerpts"][0]
    own = (excerpt["lm"], excerpt["systems"][0]["knn"])
    assert shown(browser) == pytest.approx(perplexity(*own, 0.4), rel=1e-9)
    slide = one(browser, "#lmbda-slide")
    ActionChains(browser).drag_and_drop_by_offset(slide, 40, 0).perform()
    settled(browser)
    moved = float(slide.get_attribute("value"))
    assert moved > 0.5
    assert shown(browser) == pytest.approx(perplexity(*own, moved), rel=1e-9)
    assert f"lmbda={moved:g}" in browser.current_url
    field = one(browser, "#lmbda")
    for text, invalid in (("0.125", False), ("1.5", True), ("-1", True)):
        field.clear()
        field.send_keys(text)
        settled(browser)
        assert field.get_attribute("aria-invalid") == str(invalid).lower()
    assert one(browser, "#as-tuned").is_enabled()
    one(browser, "#as-tuned").click()
    settled(browser)
    assert shown(browser) == pytest.approx(perplexity(*own, 0.4), rel=1e-9)
    # Temperature and k need all neighbors, which a report does not hold.
    assert not one(browser, "#temperature").is_displayed() and not one(browser, "#k").is_displayed()


@pytest.mark.parametrize(("lmbda", "steps"), [("0.4", 7), ("0", 1), ("0.05", 5), ("0.99", 9)])
def test_the_legend_has_no_step_that_cannot_be(browser: Any, lmbda: str, steps: int) -> None:
    field = one(browser, "#lmbda")
    field.clear()
    field.send_keys(lmbda)
    settled(browser)
    shades = [s.get_attribute("class") for s in css(browser, "#legend .swatch")]
    assert len(shades) == steps
    used = {t.get_attribute("class").split()[1] for t in css(browser, ".t")}
    assert used <= {shade.split()[1] for shade in shades}


def test_systems_are_compared(browser: Any, data: Any) -> None:
    excerpt = data["excerpts"][0]
    knn = [system["knn"] for system in excerpt["systems"]]
    assert [o.text for o in css(browser, "#against option")] == ["base LM", "exact", "nearest"]
    css(browser, "#against option")[2].click()
    settled(browser)
    sums = one(browser, ".sums")
    assert float(sums.get_attribute("data-base")) == pytest.approx(
        perplexity(excerpt["lm"], knn[1], 0.2), rel=1e-9
    )
    assert "nearest better" in one(browser, "#legend").text
    names = [dt.text for dt in css(browser, "#panel .probs dt")]
    assert {"base LM", "exact", "nearest"} <= set(names)


def test_nothing_from_the_corpus_runs(browser: Any) -> None:
    assert browser.title == "Neighbors & <friends>"
    assert css(browser, "main b, .text i:not(.mark), #panel pre i:not(.mark)") == []
    assert errors(browser) == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


OVERFLOW = """
return [...document.querySelectorAll('main *')].filter((e) => {
  const box = e.getBoundingClientRect(), style = getComputedStyle(e);
  return box.width > 1 && box.right > innerWidth + 1 && style.position !== 'absolute';
}).map((e) => e.outerHTML.slice(0, 80))"""
SCROLLS = """
return [...document.querySelectorAll('main *')].filter((e) =>
  e.scrollHeight > e.clientHeight + 1 && /auto|scroll/.test(getComputedStyle(e).overflowY)
  && e.tagName !== 'TEXTAREA').map((e) => e.id || e.className)"""


@pytest.mark.parametrize("dark", [False, True])
def test_a_wide_page_scrolls_as_one(browser: Any, dark: bool) -> None:
    resize(browser, 1280, 700, dark=dark)
    css(browser, ".t")[5].click()
    settled(browser)
    assert browser.execute_script(SCROLLS) == []
    assert browser.execute_script(OVERFLOW) == []
    # What lies beside the surface is used.
    boxes = [one(browser, f"section[aria-labelledby={n}-title]").rect for n in ("surface", "facts")]
    assert boxes[1]["x"] > boxes[0]["x"] + boxes[0]["width"] - 1
    assert abs(boxes[0]["y"] - boxes[1]["y"]) < 2
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(19, 23, 27)") == dark


def test_a_phone_reaches_everything(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    resize(browser, 400, 800)
    assert browser.execute_script(OVERFLOW) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    # Each row of the table is a card with all seven columns, named.
    cells = css(browser, "table.results tbody tr:nth-child(2) td")
    assert len(cells) == 6 and all(cell.is_displayed() for cell in cells)
    label = "return getComputedStyle(arguments[0], '::before').content"
    assert browser.execute_script(label, cells[2]) == '"temperature"'
    # A finger hits a token: none is narrower than 12 pixels.
    narrow = browser.execute_script(
        "return [...document.querySelectorAll('.t')].filter((t) => Math.max(...[...t."
        "getClientRects()].map((r) => r.width)) < 12).map((t) => t.textContent)"
    )
    assert narrow == []
    # The sheet is not in the way until a token is touched, and goes when told so.
    panel = one(browser, "#panel")
    assert not panel.is_displayed()
    css(browser, ".t")[5].click()
    assert panel.is_displayed() and panel.rect["height"] <= 0.56 * 800
    one(browser, "#close").click()
    assert not panel.is_displayed()
    active = browser.switch_to.active_element
    assert active.get_attribute("data-i") == "5"
    active.send_keys(Keys.ENTER)
    assert panel.is_displayed()
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not panel.is_displayed()


def test_the_sheet_leaves_the_token_in_sight(browser: Any, driver: Any) -> None:
    """On a phone a token that an address names, or a finger, stays above what explains it."""
    resize(browser, 400, 800)
    clear = (
        "const token = document.querySelector('.t[aria-pressed=true]').getBoundingClientRect();"
        "return token.top >= 0 && token.bottom <= "
        "document.getElementById('panel').getBoundingClientRect().top"
    )
    for token in (1, 40, 115):
        browser.get("about:blank")
        browser.get(f"{driver.address}#token={token}")
        settled(browser)
        assert one(browser, "#panel").is_displayed() and browser.execute_script(clear), token
    one(browser, "#close").click()
    last = css(browser, ".t")[60]
    browser.execute_script("arguments[0].scrollIntoView({ block: 'end' })", last)
    last.click()
    settled(browser)
    assert chosen(browser) == 60 and browser.execute_script(clear)


def test_a_link_to_a_heading_leaves_the_explorer_as_it_is(browser: Any) -> None:
    css(browser, "#excerpt option")[1].click()
    css(browser, ".t")[7].click()
    css(browser, "nav a")[-1].click()
    wait_for(browser, "location.hash === '#facts-title'")
    settled(browser)
    assert one(browser, "#excerpt").get_attribute("value") == "1" and chosen(browser) == 7
    css(browser, ".t")[9].click()
    assert browser.current_url.endswith("#excerpt=2&token=10")


def test_the_legends_numbers_stand_between_two_colours(browser: Any) -> None:
    swatches = [s.rect for s in css(browser, "#legend .swatch")]
    edges = css(browser, "#legend .edge")
    said = ["−0.3", "−0.1", "+0.1", "+0.3", "+0.8", "+2"]
    assert [edge.text for edge in edges] == said
    for edge, swatch in zip(edges, swatches[1:], strict=True):
        middle = edge.rect["x"] + edge.rect["width"] / 2
        assert abs(middle - swatch["x"]) < 2
    for left, right in pairwise(edges):
        assert left.rect["x"] + left.rect["width"] < right.rect["x"]


#: Words whose contrast is under WCAG's 4.5 (3 where they are large), with it; also shades of tokens
#: that this text has not. `everything` returns the others too.
CONTRAST = """
const everything = arguments[0];
const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number);
  return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
const light = (c) => { const f = c.slice(0, 3).map((x) => x / 255).map((x) =>
  x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
function ground(e) {
  const layers = [];
  for (let at = e; at; at = at.parentElement) {
    layers.push(parse(getComputedStyle(at).backgroundColor));
    if (layers.at(-1)[3] === 1) break;
  }
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
}
for (let d = -4; d <= 4; d++) {
  const token = document.createElement('span');
  token.className = `t d${d}`;
  token.textContent = 'word';
  document.querySelector('.text')?.append(token);
}
const found = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
  if (e.closest('script, style, noscript, [aria-hidden=true], :disabled, .sr, .skip')) continue;
  const style = getComputedStyle(e), back = ground(e);
  const fore = over(parse(e instanceof SVGElement ? style.fill : style.color), back);
  const [high, low] = [light(fore), light(back)].sort((a, b) => b - a);
  const ratio = (high + 0.05) / (low + 0.05), size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  if (everything || ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${e.outerHTML}`);
}
return found"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_words_stand_out(browser: Any, width: int, dark: bool) -> None:
    resize(browser, width, 900, dark=dark)
    css(browser, ".t")[5].click()
    settled(browser)
    assert browser.execute_script(CONTRAST, False) == []
    assert len(browser.execute_script(CONTRAST, True)) > 100
    browser.execute_script("document.body.style.setProperty('--muted', 'rgb(128 128 128)')")
    assert browser.execute_script(CONTRAST, False) != []  # it sees what is faint


@pytest.mark.parametrize("width", [1280, 400])
def test_the_surfaces_words_can_be_read(browser: Any, width: int) -> None:
    """Not smaller than nine pixels, none on another, none cut."""
    resize(browser, width)
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg text')].map((t) => "
        "[t.textContent, ...['x', 'y', 'right', 'bottom', 'height'].map((n) => "
        "t.getBoundingClientRect()[n])])"
    )
    frame = one(browser, "figure svg").rect
    assert len(boxes) > 8
    for i, (text, x, y, right, bottom, height) in enumerate(boxes):
        assert height >= 9, text
        assert frame["x"] <= x and right <= frame["x"] + frame["width"], text
        for other, x2, y2, right2, bottom2, _ in boxes[:i]:
            assert right <= x2 or right2 <= x or bottom <= y2 or bottom2 <= y, (text, other)


def test_everything_has_a_name(browser: Any) -> None:
    """Every control has words for those who do not see it, and no id stands twice."""
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter((e) => "
        "!e.textContent.trim() && !e.ariaLabel && !e.labels?.length).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    labels = [t.get_attribute("aria-label") for t in css(browser, ".t")]
    assert all("nats" in label for label in labels)
    # Signs for the eye are not read out by their names.
    assert not set("␣⏎⇥") & set("".join(labels)) and any("line end" in label for label in labels)
