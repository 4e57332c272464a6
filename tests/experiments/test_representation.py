"""Representation and distance: t is a scale, the floor, and a run of the tiny preset."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from knnext.experiments import representation
from knnext.experiments.lab import searches
from knnext.experiments.run import run_experiment
from tests.experiments.planted_lab import DIM, ROWS, PlantedLab, drawn_at, scores_of

GRID = tuple(2.0**n for n in range(-2, 6))
SHORT = {"representation.temperatures": (0.5, 1.0, 2.0)}
SEEDS = {"valid": 0, "test": 1}


@cache
def planted(split, temperature=2.0):
    distances, tokens, targets = drawn_at(temperature, count=2000, seed=SEEDS[split])
    return distances, tokens, targets, torch.full((len(targets),), -4.0)


def by(pairs, **wanted):
    (found,) = (p for p in pairs if all(p[name] == value for name, value in wanted.items()))
    return found


def test_states_that_differ_in_scale_alone_are_equal_once_t_is_fitted(tmp_path):
    """Unit keys: |q - x|^2 = 2 - 2 <q, x>, so ip wants half the t of l2; ffn states twice as long
    want four times the t of att's."""

    def plant(setting, split):
        distances, *rest = planted(split)
        distances = distances * (4 if setting.h_ds == "ffn" else 1)
        return scores_of(distances / 2 - 1 if setting.metric == "ip" else distances, *rest)

    lab = PlantedLab(tmp_path, plant, **{"representation.temperatures": GRID})
    findings = representation.run(lab)
    fitted = {(r["h_ds"], r["metric"]): r for r in findings.rows if r["t is"] == "fitted"}
    t = fitted["att", "l2"]["t"]
    assert t == pytest.approx(2, rel=0.2)
    assert fitted["att", "ip"]["t"] == pytest.approx(t / 2)
    assert fitted["ffn", "l2"]["t"] == pytest.approx(4 * t)
    assert fitted["ffn", "ip"]["t"] == pytest.approx(2 * t)
    assert len({round(r["mixture"], 3) for r in fitted.values()}) == 1
    for pair in findings.details["pairs"]:
        if pair["t"] == representation.FITTED:
            assert pair["value"] == pytest.approx(0, abs=1e-5)
    one = by(findings.details["pairs"], pair="att over ffn", fixed="l2", t="t = 1", score="real",
             mask="exact")  # fmt: skip
    assert one["low"] > 0.05  # the longer states lose by their length
    assert findings.details["parts"] == {
        "att matters at t = 1": "agrees",
        "att matters with t fitted": "disagrees",
        "l2 and ip differ little for att": "agrees",
    }
    assert findings.agreement == "agrees in part"


def test_a_state_that_knows_nothing_loses_whatever_t_is(tmp_path):
    def plant(setting, split):
        distances, tokens, targets, log_p_lm = planted(split, 1.0)
        if setting.h_ds == "ffn":
            tokens = tokens.roll(1, 0)  # another query's neighbors
        return scores_of(distances, tokens, targets, log_p_lm)

    findings = representation.run(PlantedLab(tmp_path, plant, **SHORT))
    assert findings.agreement == "agrees"
    fitted = [r for r in findings.rows if r["t is"] != "1"]
    att, ffn = (by(fitted, h_ds=s, metric="l2", mask="exact") for s in ("att", "ffn"))
    assert att["mixture"] < ffn["mixture"]
    assert att["extra parameters"] == ROWS * DIM


def test_the_component_alone_is_infinite_but_for_the_floor(tmp_path):
    """A fifth of the targets is never found: infinite perplexity, or the floor's 10,000 nats."""

    def plant(_setting, split):
        _, tokens, targets, log_p_lm = planted(split)
        found = torch.arange(len(targets)) % 5 > 0
        tokens = torch.where(found, targets, targets + 1)[:, None]
        return scores_of(torch.zeros(len(targets), 1), tokens, targets, log_p_lm)

    for row in representation.run(PlantedLab(tmp_path, plant, **SHORT)).rows:
        assert row["kNN only"] is None
        assert row["targets found"] == pytest.approx(0.8)
        floored = row["kNN only with floor, log10 per word"]
        assert floored == pytest.approx(0.2 * 10_000 / math.log(10))


def test_searches_are_shared_by_both_ways_of_choosing_t(tmp_path):
    lab = PlantedLab(tmp_path, lambda _setting, split: scores_of(*planted(split)), **SHORT)
    representation.run(lab)
    assert len(lab.searched) == len(set(lab.searched)) == 24  # 12 members, valid and test


@pytest.mark.slow
def test_tiny_run(tiny_lab, tmp_path, monkeypatch):
    result = run_experiment("representation", tiny_lab.preset, tmp_path, lab=tiny_lab, say=_quiet)
    rows = result["rows"]
    assert len(rows) == 24
    base = math.exp(-float(tiny_lab.split("test").log_p_lm.mean()))
    for row in rows:
        assert row["oracle"] <= row["mixture"] + 1e-9
        assert row["oracle"] <= base
        assert 0 <= row["lmbda"] <= 1
        assert row["extra parameters"] == tiny_lab.store().num_entries * tiny_lab.store().dim
    for state in ("att", "ffn"):
        one = {"h_ds": state, "metric": "l2", "t is": "1", "mask": "faiss"}
        real, codes = (by(rows, **one, score=score) for score in ("real", "faiss"))
        assert real["targets found"] == codes["targets found"]  # one mask, two scores
    assert (tmp_path / "representation.png").stat().st_size > 10_000

    def refuse(*_arguments):
        raise AssertionError("searched again")

    monkeypatch.setattr(searches, "search", refuse)
    again = run_experiment(
        "representation", tiny_lab.preset, tmp_path, lab=tiny_lab, fresh=True, say=_quiet
    )
    assert again["rows"] == rows


def _quiet(_line):
    pass
