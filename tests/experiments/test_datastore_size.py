"""Size of the datastore: slopes and shares whose values are known, and a run of the tiny preset."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from knnext.evaluation.perplexity import TextCounts
from knnext.experiments import datastore_size
from knnext.experiments.lab import searches
from knnext.experiments.lab.growth import per_doubling, r_squared
from knnext.experiments.lab.mixture import Split
from knnext.experiments.run import run_experiment
from tests.experiments.planted_lab import ROWS, PlantedLab, scores_of

COUNT, P_LM = 2000, 0.02
FRACTIONS = (0.1, 0.2, 0.4, 0.6, 0.9, 1.0)


def plant_hits(share):
    """p_knn is 1 for `share(fraction)` of the targets, the same and more as it grows, else 0."""

    def plant(setting, _split):
        targets = torch.arange(COUNT) % 50
        rank = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
        hit = rank < round(share(setting.fraction) * COUNT)
        tokens = torch.where(hit, targets, 50)[:, None]
        log_p_lm = torch.full((COUNT,), math.log(P_LM))
        return scores_of(torch.zeros(COUNT, 1), tokens, targets, log_p_lm)

    return plant


def run(tmp_path, share):
    options = {
        "datastore-size.fractions": FRACTIONS,
        "datastore-size.temperatures": (0.5, 2.0),
    }
    lab = PlantedLab(tmp_path, plant_hits(share), **options)
    return lab, datastore_size.run(lab)


def test_weight_and_perplexity_follow_the_share_of_targets_found(tmp_path):
    """With hits of share f and p_lm = c: (1 - lmbda) c + lmbda = f, lmbda = (f - c) / (1 - c)."""
    lab, findings = run(tmp_path, lambda fraction: 0.6 * fraction)
    assert len(findings.rows) == 3 * len(FRACTIONS)
    for row in findings.rows:
        f = 0.6 * row["fraction"]
        assert row["entries"] == round(ROWS * row["fraction"])
        assert row["lmbda"] == pytest.approx((f - P_LM) / (1 - P_LM), abs=1e-3)
        nll = -f * math.log(f) - (1 - f) * math.log((1 - f) * P_LM / (1 - P_LM))
        assert row["mixture"] == pytest.approx(math.exp(nll), rel=1e-5)
        assert row["oracle"] == pytest.approx(P_LM ** -(1 - f), rel=1e-5)
    assert findings.details["parts"]["the smallest beats the LM"] == "agrees"
    assert findings.details["parts"]["no saturation"] == "agrees"
    whole = [r for r in findings.rows if r["fraction"] == 1]
    assert [r["share of the whole gain"] for r in whole] == [1, 1, 1]
    assert len(lab.searched) == len(set(lab.searched)) == 2 * len(findings.rows)


def test_what_no_longer_grows_is_not_called_unsaturated(tmp_path):
    _, findings = run(tmp_path, lambda fraction: 0.6 * min(fraction, 0.4))
    assert findings.details["parts"]["no saturation"] == "undecided"
    assert findings.details["parts"]["almost linear with t fitted"] == "disagrees"
    assert findings.agreement == "agrees in part"  # the smallest still helps


def document_split(log_p_lm):
    count = len(log_p_lm)
    ids = torch.arange(count) // 10
    counts = TextCounts(count, count, None, count // 10)
    return Split("test", log_p_lm, torch.zeros(count, dtype=torch.int64), ids, counts)


def test_gain_of_a_doubling():
    noise = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = [50, 100, 300, 1000]
    log_ps = [noise + 0.07 * math.log2(n) for n in sizes]
    gain = per_doubling(document_split(noise), sizes, log_ps, 200)
    # The documents differ much, but all gain alike: paired, the slope is certain.
    for value in (gain.value, gain.interval.low, gain.interval.high):
        assert value == pytest.approx(0.07)
    uneven = [x + 0.05 * noise * math.log2(n) for x, n in zip(log_ps, sizes, strict=True)]
    gain = per_doubling(document_split(noise), sizes, uneven, 200)
    assert gain.interval.low < gain.value - 0.002 < gain.value + 0.002 < gain.interval.high
    with pytest.raises(ValueError, match="sizes must hold two different ones at least"):
        per_doubling(document_split(noise), [50, 50], log_ps[:2])


def test_straightness():
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert r_squared(sizes, [10 - n for n in sizes]) == pytest.approx(1)
    assert r_squared(np.log2(sizes), [3 - math.log2(n) for n in sizes]) == pytest.approx(1)
    assert r_squared(sizes, [3 - math.log2(n) for n in sizes]) == pytest.approx(0.92)
    assert r_squared(sizes, [5, 5, 5, 5]) == 1


def test_one_size_is_refused(tmp_path):
    lab = PlantedLab(tmp_path, plant_hits(float), **{"datastore-size.fractions": (1.0,)})
    with pytest.raises(ValueError, match=r"datastore-size\.fractions must name two sizes or more"):
        datastore_size.run(lab)


@pytest.mark.slow
def test_tiny_run(tiny_lab, tmp_path, monkeypatch):
    options = {"datastore-size.fractions": (0.25, 0.5, 1.0)}
    monkeypatch.setattr(tiny_lab, "preset", tiny_lab.preset.with_options(options=options))
    searched, search = [], searches.search

    def count(store, queries, k, setting, *rest):
        searched.append((setting, len(queries)))
        return search(store, queries, k, setting, *rest)

    monkeypatch.setattr(searches, "search", count)
    arguments = {"lab": tiny_lab, "say": lambda _line: None}
    result = run_experiment("datastore-size", tiny_lab.preset, tmp_path, **arguments)
    assert len(searched) == len(set(searched)) <= 9 * 2
    rows = result["rows"]
    assert len(rows) == 9
    exact = [r for r in rows if r["mask"] == "exact"]
    assert [r["neighbors found"] for r in exact] == [tiny_lab.preset.k] * 3
    assert exact[0]["mixture"] > exact[-1]["mixture"]  # four times the rows
    for row in rows:
        assert row["oracle"] <= min(row["mixture"], result["series"]["base"])
        assert row["neighbors found"] <= tiny_lab.preset.k
        assert row["mixture at t = 1"] > 1
    assert (tmp_path / "datastore-size.png").stat().st_size > 10_000
    done = len(searched)
    run_experiment("datastore-size", tiny_lab.preset, tmp_path, fresh=True, **arguments)
    assert len(searched) == done  # temperatures and weights anew, searches not


def test_samples_are_nested(tiny_lab):
    small, large = (tiny_lab.store(fraction=f) for f in (0.25, 0.5))
    kept = {tuple(row) for row in large.keys[0 : len(large)].tolist()}
    assert all(tuple(row) in kept for row in small.keys[0 : len(small)].tolist())
    assert len(small) == pytest.approx(len(large) / 2, abs=1)
