"""What a reader sees in an experiment's figure: words that can be read, one look a system."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnext.experiments.catalog import load

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

from knnext.experiments.lab import figures

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FILES = sorted(RESULTS.glob("*/*.json"))
#: What only a reader of the code would understand.
CODE_NAMES = re.compile(r"\b(l2|ip|W_\w+|V x D|nprobe|valid|faiss)\b|\de[-+]\d|\braw\b")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            path,
            id=f"{path.parent.name}/{path.stem}",
            marks=[] if path.parent.name == "small-stdlib" else [pytest.mark.slow],
        )
        for path in FILES
    ],
)
def figure(request: pytest.FixtureRequest) -> Any:
    """A figure of a result in the docs, drawn."""
    result = json.loads(request.param.read_text(encoding="utf-8"))
    drawn, axes = figures.new_figure()
    load(request.param.stem).plot(result, axes)
    FigureCanvasAgg(drawn).draw()
    return drawn


def shown(figure: Any) -> list[Any]:
    """The texts that can be seen."""
    found = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                # Beyond its axis a tick is not drawn.
                if not low <= tick.get_loc() <= high:
                    tick.label1.set_visible(False)
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            found.append(text)
    return found


def test_no_word_lies_on_another_or_is_cut(figure: Any) -> None:
    texts, edge = shown(figure), figure.bbox
    boxes = [text.get_window_extent() for text in texts]
    for text, inside in zip(texts, boxes, strict=True):
        assert edge.x0 - 1 <= inside.x0 and inside.x1 <= edge.x1 + 1, text
        assert edge.y0 - 1 <= inside.y0 and inside.y1 <= edge.y1 + 1, text
    # A touch is none.
    smaller = [(text, whole.padded(-1.5)) for text, whole in zip(texts, boxes, strict=True)]
    for (one, a), (other, b) in combinations(smaller, 2):
        assert not a.overlaps(b), (one.get_text(), other.get_text())


def test_no_legend_covers_a_curve(figure: Any) -> None:
    legends = [axes.get_legend() for axes in figure.axes] + figure.legends
    places = [legend.get_window_extent() for legend in legends if legend is not None]
    for axes in figure.axes:
        for line in axes.lines:
            if line.get_transform() != axes.transData:
                continue  # a level or an upright from edge to edge
            points = line.get_transform().transform(np.asarray(line.get_xydata(), dtype=float))
            for place in places:
                assert not any(place.contains(*p) for p in points if np.isfinite(p).all()), line


def test_every_axis_says_what_it_is(figure: Any) -> None:
    drawn = [axes for axes in figure.axes if axes.axison]
    names = [axes.get_xlabel() for axes in drawn]
    assert any(names)
    for axes in drawn:
        lowest = all(other.bbox.y0 >= axes.bbox.y0 - 1 for other in drawn if _over(other, axes))
        assert axes.get_xlabel() or not lowest
        words = any(re.search("[a-z]", t.get_text()) for t in axes.get_yticklabels())
        shared = axes.get_shared_y_axes().get_siblings(axes)
        assert words or any(one.get_ylabel() for one in shared)
    for axes in drawn:
        for label, scale in ((axes.get_xlabel(), axes.get_xscale()), (axes.get_ylabel(), "")):
            assert ("log" in label) or scale != "log"
            assert not label.startswith("gain") or "nats" in label
            assert "change" not in label or "%" in label


def _over(one: Any, other: Any) -> bool:
    """Whether two panels stand in one column."""
    return bool(one.bbox.x0 < other.bbox.x1 and other.bbox.x0 < one.bbox.x1)


def test_words_are_no_code_names(figure: Any) -> None:
    for text in shown(figure):
        assert not CODE_NAMES.search(text.get_text()), text.get_text()


def test_words_stand_out_from_the_page(figure: Any) -> None:
    for text in shown(figure):
        assert 1.05 / (luminance(text.get_color()) + 0.05) >= 4.5, text.get_text()


def luminance(color: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_a_way_of_searching_has_one_look_everywhere(figure: Any) -> None:
    """Label, colour and mark of a curve go together in all figures."""
    looks = {figures.searched(*way): figures.look(*way) for way in WAYS}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            words = re.sub(r", (t = 1|t fitted)$", "", label)
            if words in looks:
                found = {"color": to_hex(handle.get_color()), "marker": handle.get_marker()}
                assert found == looks[words], label


@pytest.mark.parametrize(
    ("name", "series"),
    [("temperature", "curves"), ("approximation", "points"), ("padding", "origins")],
)
def test_one_size_of_the_datastore_is_drawn_as_well(name: str, series: str) -> None:
    """As a preset of one size has it: a narrow figure, in which all still has its place."""
    path = RESULTS / "small-stdlib" / f"{name}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    whole = result["series"][series]
    result["series"][series] = [part for part in whole if part["fraction"] == 1.0]
    assert 0 < len(result["series"][series]) < len(whole)
    drawn, axes = figures.new_figure()
    load(name).plot(result, axes)
    FigureCanvasAgg(drawn).draw()
    test_no_word_lies_on_another_or_is_cut(drawn)
    test_no_legend_covers_a_curve(drawn)


WAYS = [(mask, score) for mask in ("exact", "faiss") for score in ("real", "faiss")]
#: Machado, Oliveira and Fernandes (2009), at full strength.
BLINDNESS = {
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    "none": np.eye(3).tolist(),
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_ways_of_searching_stay_apart_for_all_eyes(kind: str) -> None:
    colors = [figures.look(*way)["color"] for way in WAYS]
    seen = [_lab(np.array(BLINDNESS[kind]) @ _linear(color)) for color in colors]
    for a, b in combinations(seen, 2):
        assert np.linalg.norm(a - b) > 18  # of CIELAB, where 2 can just be told apart
    assert len({figures.look(*way)["marker"] for way in WAYS}) == len(WAYS)
    for color in colors:
        assert 1.05 / (luminance(color) + 0.05) >= 3  # WCAG's for pictures


def _linear(color: str) -> Any:
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _lab(linear: Any) -> Any:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ linear.clip(0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_bars_say_their_numbers_and_what_harms_has_its_colour() -> None:
    _, axes = figures.new_figure()
    spans = [(-3.0, -1.0), (1.0, 2.0), (None, None), (None, None)]
    figures.bars(axes, list("abcd"), [-2.0, 1.5, None, -9.0], spans, standard="d")
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["−2.0  [−3.0, −1.0]", "+1.5  [+1.0, +2.0]", "–", "−9.0"]
    fills = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    assert fills == [figures.PALE, figures.PALE_OVER, figures.PALE, figures.STRONG]
    _, axes = figures.new_figure()
    figures.bars(axes, list("ab"), [0.25, -0.5], good=1, digits=2)
    assert [text.get_text() for text in axes.texts] == ["0.25", "−0.50"]
    assert [to_hex(b.get_facecolor()) for b in axes.patches] == [figures.PALE, figures.PALE_OVER]


def test_a_picture_is_small_and_a_page_of_them_too(tmp_path: Path) -> None:
    """Plain fills and lines need no more than 256 colours: a third of the size."""
    from PIL import Image

    from knnext.experiments.report import write_report
    from knnext.report.plots import save_figure

    figure, axes = figures.new_figure()
    figures.line(axes, [0, 1, 2], [1.0, 3.0, 2.0], "a")
    for name in ("a.png", "B.PNG", "a.svg"):
        save_figure(figure, tmp_path / name)
    for name in ("a.png", "B.PNG"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and picture.mode == "P"
            assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert all(path.stat().st_size < 200_000 for path in RESULTS.glob("*/*.png"))
    for path in (RESULTS / "small-stdlib").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    page, _ = write_report(tmp_path, say=lambda line: None)
    assert page.stat().st_size < 2_000_000
