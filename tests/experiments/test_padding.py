"""The padding experiment: what rows explain where the answer is planted, and a tiny run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from knnext.evaluation.perplexity import TextCounts
from knnext.experiments import padding
from knnext.experiments.lab.contrast import Fitted
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.figures import new_figure
from knnext.experiments.lab.mixture import Split, report
from knnext.experiments.lab.zero_rows import insert_zero_rows, places_taken
from knnext.experiments.run import run_experiment

COUNT = 400


@pytest.fixture(scope="module")
def test_split():
    log_p = -1 - torch.rand(COUNT, generator=torch.Generator().manual_seed(0)).double()
    documents = torch.arange(20).repeat_interleave(COUNT // 20)
    return Split("test", log_p, documents, documents, TextCounts(COUNT, COUNT, COUNT, 20))


def arm(split, setting, nprobe, shift):
    log_p = split.log_p_lm + shift
    return padding.Arm(
        setting,
        nprobe,
        Fitted(report(split, log_p, 1.0), log_p, 0.0, {1.0: 1.0}),
        torch.zeros(COUNT),
        {},
        1.0,
        torch.ones(COUNT),
        0.0,
    )


def arms(split, exact, faiss, exact_rows, faiss_rows):
    """Mixtures that lie these many nats above the LM everywhere."""
    made = []
    for share, (e, f) in ((0.0, (exact, faiss)), (0.3, (exact_rows, faiss_rows))):
        made.append(arm(split, Setting(padding=share), 0, e))
        made.append(arm(split, Setting(mask="faiss", score="faiss", padding=share), 32, f))
    return made


def only(split, *shifts):
    (contrast,) = padding.compare(arms(split, *shifts), split, 100)
    return contrast


def test_rows_explain_all_of_an_advantage_that_they_make(test_split):
    c = only(test_split, 0.3, 0.3, 0.2, 0.3)
    assert c.with_rows.value == pytest.approx(0.1)
    assert c.without.value == pytest.approx(0)
    assert c.share == pytest.approx(1)


def test_rows_explain_none_of_an_advantage_that_stays(test_split):
    c = only(test_split, 0.3, 0.5, 0.1, 0.3)
    assert c.without.value == pytest.approx(0.2)
    assert c.explained.value == pytest.approx(0)
    assert c.share == pytest.approx(0)


def test_rows_explain_a_part(test_split):
    assert only(test_split, 0.3, 0.4, 0.1, 0.5).share == pytest.approx(0.75)


def test_without_an_advantage_there_is_nothing_to_explain(test_split):
    c = only(test_split, 0.3, 0.1, 0.2, 0.1)
    assert c.with_rows.value < 0
    assert c.explained.value == pytest.approx(0.1)
    assert c.share is None


@pytest.fixture(scope="module")
def result(tiny_lab):
    preset = replace(
        tiny_lab.preset,
        options={
            "padding.temperatures": (0.5, 2.0, 8.0),
            "padding.moved_temperatures": (0.5, 2.0, 8.0),
            "padding.mean_shares": (0.0, 0.3),
            "padding.nprobes": (64,),
        },
    )
    tiny_lab.preset = preset
    try:
        yield run_experiment(
            "padding", preset, tiny_lab.folder, lab=tiny_lab, say=lambda _line: None
        )
    finally:
        tiny_lab.preset = replace(preset, options={})


def test_rows_are_complete(result):
    shown = {
        (r["fraction"], r["zero rows"], r["mask"], r["score"], r["nprobe"]) for r in result["rows"]
    }
    wanted = {("exact", "real", None), ("faiss", "faiss", 4), ("faiss", "faiss", 64)}
    wanted.add(("faiss", "real", 4))
    assert shown == {(f, p, *w) for f in (0.05, 1.0) for p in (0.0, 0.264) for w in wanted}
    assert len(result["rows"]) == len(shown)
    for row in result["rows"]:
        assert list(row) == list(result["rows"][0])
        if not row["zero rows"]:
            assert row["places of zero rows"] == row["queries that meet one"] == 0
            assert row["their probability at t"] == 0


def test_contrasts_add_up(result):
    for c in result["series"]["contrasts"]:
        parts = c["with_rows"]["value"] - c["without"]["value"]
        assert c["explained"]["value"] == pytest.approx(parts, abs=1e-9)
        assert c["explained"]["low"] <= c["explained"]["value"] <= c["explained"]["high"]


def test_zero_rows_never_help_exact_search_where_t_and_lmbda_are_given(tiny_lab):
    """They take places and probability, and no text contains their value."""
    clean = tiny_lab.neighbors(Setting(fraction=0.05), "test")
    queries = tiny_lab.states("test").keys.half().float()
    near = insert_zero_rows(clean, queries.square().sum(1) * 0.2, 300, tiny_lab.padding_token)
    assert places_taken(near, tiny_lab.padding_token).sum() > 0
    for t in (0.5, 5.0):
        assert (near.log_p(t, 0.3) <= clean.log_p(t, 0.3) + 1e-6).all()


def test_exact_search_meets_the_rows_where_distances_say(tiny_lab, result):
    """The padded search finds what the clean one finds, with |q|^2 put in its place."""
    for fraction in (0.05, 1.0):
        clean = tiny_lab.neighbors(Setting(fraction=fraction), "test")
        padded = tiny_lab.neighbors(Setting(fraction=fraction, padding=0.264), "test")
        rows = len(tiny_lab.store(fraction=fraction, padding=0.264))
        zeros = rows - len(tiny_lab.store(fraction=fraction))
        assert zeros / rows == pytest.approx(0.264, abs=1e-3)
        queries = tiny_lab.states("test").keys.half().float()
        made = insert_zero_rows(clean, queries.square().sum(1), zeros, tiny_lab.padding_token)
        torch.testing.assert_close(made.distances, padded.distances, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(made.log_p_knn(2.0), padded.log_p_knn(2.0), atol=1e-3, rtol=1e-3)


def test_depths_and_origins_are_monotone(result):
    for curve in result["series"]["depths"]["curves"]:
        assert all(
            a <= b + 1e-12 for a, b in zip(curve["places"], curve["places"][1:], strict=False)
        )
    for fraction in (0.05, 1.0):
        moved = [o for o in result["series"]["origins"] if o["fraction"] == fraction and o["moved"]]
        taken = [o["places"] for o in sorted(moved, key=lambda o: o["mean_share"])]
        assert taken == sorted(taken, reverse=True)


def test_the_figure_draws(result, tiny_lab):
    assert (tiny_lab.folder / "padding.png").stat().st_size > 10_000
    figure, axes = new_figure()
    padding.plot(result, axes)
    assert len(figure.axes) == 4
    assert all(math.isfinite(r["perplexity"]) for r in result["rows"])


def test_the_verdict_is_the_one_of_the_intervals_without_rows(result, tiny_lab):
    nprobe = tiny_lab.preset.nprobe
    main = [c["without"] for c in result["series"]["contrasts"] if c["nprobe"] == nprobe]
    assert len(main) == 4
    better, worse = sum(c["low"] > 0 for c in main), sum(c["high"] < 0 for c in main)
    wanted = "disagrees" if worse else "undecided"
    if better:
        wanted = "agrees" if better == len(main) else "agrees in part"
    assert result["agreement"] == wanted
