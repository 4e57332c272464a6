"""docs/scale.md: its tables are the plan's own arithmetic, and its figure is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from knnext.planning import scale
from knnext.planning.placement import place
from knnext.planning.search_time import batch_time
from knnext.planning.stated import SHARES, STATED
from knnext.planning.traffic import ANSWER_BYTES

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_says_what_the_arithmetic_says():
    """`python -m knnext.planning docs` writes it anew."""
    page = (DOCS / "scale.md").read_text(encoding="utf-8")
    assert scale.with_tables(page) == page
    assert (DOCS / scale.FIGURE).stat().st_size > 10_000 and f"({scale.FIGURE})" in page


def test_the_figure_tells_its_lines_apart_and_what_they_are():
    pytest.importorskip("matplotlib")
    figure = scale.draw()
    figure.canvas.draw()
    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_label() in scale._LOOKS]
        assert len(lines) >= 3
        assert "log scale" in axes.get_xlabel()
        legend = figure.legends[0].get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())
    assert "predicted" in figure.axes[0].get_ylabel()
    strokes = [stroke for _, stroke in scale._LOOKS.values()]
    assert len(set(strokes)) == len(strokes)  # told apart where colours are not


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="0 places for the table 'stores'"):
        scale.with_tables("no tables")


@pytest.mark.parametrize("name", sorted(STATED))
def test_crossings_are_where_the_two_are_equal(name):
    """The formulas of the page, against a search at the size that they name."""
    rates = STATED[name]
    gpus = rates.machine.gpus
    flops, near = rates["search_flops.float16"], rates["search_bytes.float16"]
    job = replace(scale.BASE, tokens=10**7, gpus=gpus, nodes=1, queries=round(flops / near))
    search = batch_time(job, place(job, rates.machine), rates).search
    assert search.compute == pytest.approx(search.read, rel=0.05)
    rows = (scale.K * ANSWER_BYTES + 2 * scale.DIM) * flops / (2 * scale.DIM * rates["network"])
    # One rank a node: all that travels does over the network.
    apart = replace(scale.BASE, gpus=0, nodes=64, tokens=round(64 * rows), queries=4096)
    time = batch_time(apart, place(apart, rates.machine), rates)
    wires = time.exchange - 2 * time.latency
    assert wires == pytest.approx(time.search.compute * 63 / 64, rel=0.05)


def test_fewer_answers_a_shard_are_enough_but_for_one_in_10_to_the_9():
    """Chernoff's bound of a binomial count; at 1,024 of one rank all are asked for."""
    from math import log

    assert scale.answers_a_shard(1024, 1) == 1024
    for ranks in (8, 64, 1000, 16_360):
        most, mean = scale.answers_a_shard(1024, ranks), 1024 / ranks
        assert mean - most + most * log(mean / most) < log(1e-9)


def test_every_stated_rate_has_a_source_and_a_share():
    assert all(0 < share <= 1 for share in SHARES.values())
    for rates in STATED.values():
        assert all("stated, not measured: " in rate.source for rate in rates.rates.values())
