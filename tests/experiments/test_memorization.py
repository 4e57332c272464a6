"""Memorizing: the text is learned by heart, dropout is off, and the figures hold together."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs knnext[lm]")

from knnext.evaluation.bootstrap import Interval
from knnext.experiments import memorization
from knnext.experiments.lab import Lab, lm_training
from knnext.experiments.lab.contrast import Gain
from knnext.experiments.lab.memorizing import load_checkpoints, memorize
from knnext.experiments.run import run_experiment
from knnext.lm.train import TrainConfig

OPTIONS = {
    "memorization.tokens": 1500,
    "memorization.epochs": (1, 3, 12),
    "memorization.learning_rate": 3e-3,
}


@pytest.fixture(scope="module")
def lab(tiny_lab: Lab) -> Lab:
    preset = replace(tiny_lab.preset, options=OPTIONS)
    return Lab(preset, tiny_lab.folder, tiny_lab.say)


@pytest.fixture(scope="module")
def result(lab: Lab) -> dict[str, Any]:
    return run_experiment("memorization", lab.preset, lab.folder, lab=lab)


def gain(low: float, high: float) -> Gain:
    return Gain((low + high) / 2, Interval(low, high, 0.95))


def test_no_gain_agrees_and_a_gain_is_held_against_the_datastore() -> None:
    ahead, behind = gain(0.1, 0.2), gain(-0.2, -0.1)
    assert memorization.agreement(gain(-0.1, 0.005), behind) == "agrees"
    assert memorization.agreement(gain(-0.1, 0.1), behind) == "undecided"
    assert memorization.agreement(gain(math.nan, math.nan), behind) == "undecided"
    assert memorization.agreement(gain(0.0, 0.0), behind) == "agrees"
    assert memorization.agreement(gain(0.1, 0.2), ahead) == "agrees in part"
    assert memorization.agreement(gain(0.1, 0.2), behind) == "disagrees"


def test_the_text_is_learned_by_heart_epoch_by_epoch(result: dict[str, Any]) -> None:
    nll = result["series"]["train nll"]
    assert nll[0] > nll[1] > nll[2] and nll[2] < nll[0] - 0.5


def test_a_mixture_lies_between_base_and_oracle_and_correlations_within_bounds(
    result: dict[str, Any],
) -> None:
    base, rows = result["series"]["base"], result["rows"]
    assert [row["epoch"] for row in rows] == [1, 3, 12, None, None, None, None]
    for row in rows:
        assert 0 <= row["lmbda"] <= 1
        assert row["lmbda"] > 0 or row["perplexity"] == pytest.approx(base)
        assert all(-1 <= float(row[n].split()[0]) <= 1 for n in ("Pearson", "Spearman"))
    whole = rows[4]
    assert whole["component"] == "datastore of all rows" and whole["Pearson"].startswith("1.00")


def test_the_figure_is_drawn(result: dict[str, Any], lab: Lab) -> None:
    assert (lab.folder / "memorization.png").stat().st_size > 10_000


def test_a_rerun_trains_nothing_and_finds_the_same(result: dict[str, Any], lab: Lab) -> None:
    again = memorization.run(Lab(lab.preset, lab.folder, lab.say))
    assert again.words == result["words"]


def test_the_datastore_of_the_same_tokens_holds_them_and_no_more(lab: Lab) -> None:
    part = memorization.part_lab(lab)
    assert len(part.store("att")) == len(part.text("store").tokens) - 1 <= 1500


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_weights(lab: Lab, tmp_path: Path) -> None:
    """Epochs 1 and 2 in one go, or 1, a stop, and 2."""
    part = memorization.part_lab(lab)
    settings = {**memorization._settings(lab, part), "epochs": [1, 2]}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for one in (whole, halves):
        one.mkdir()
    memorize(lab, part, settings, whole)
    memorize(lab, part, {**settings, "epochs": [1]}, halves)
    memorize(lab, part, settings, halves)
    first, second = (load_checkpoints(one, [1, 2]) for one in (whole, halves))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.log_p["test"], b.log_p["test"])
        assert a.train_nll == pytest.approx(b.train_nll)


def test_the_loss_is_of_the_token_after_each_position() -> None:
    tokens = torch.tensor([3, 1, 4, 1, 5])
    loss = lm_training.next_token_loss(tokens)
    logits = 50 * torch.nn.functional.one_hot(tokens[[1, 4]], 6).float()
    assert float(loss(logits, torch.tensor([0, 3]))) == pytest.approx(0, abs=1e-6)
    assert float(loss(logits, torch.tensor([3, 0]))) == pytest.approx(50)


def test_training_blocks_fit_a_text_without_choice(lab: Lab) -> None:
    """A stream of one token: its nll goes to zero."""
    from knnext.lm.train import new_model

    config = TrainConfig(vocab_size=512, num_layers=1, dim=16, num_heads=2, block_size=16)
    model = new_model(config, lab.tokenizer)
    tokens = torch.full((400,), 7)
    schedule = lm_training.BlockSchedule(40, 16, 8, learning_rate=3e-2, weight_decay=0.0)
    starts = lm_training.passes(len(tokens), 16, torch.Generator().manual_seed(0))
    loss = lm_training.next_token_loss(tokens)
    losses = lm_training.train_blocks(model, tokens, starts, schedule, loss)
    assert len(losses) == 40 and losses[0] > 5 and losses[-1] < 0.5
    assert schedule.rate(0) < schedule.rate(4) > schedule.rate(39) > 0


def test_passes_cut_every_block_from_the_stream_once() -> None:
    source = lm_training.passes(100, 10, torch.Generator().manual_seed(0))
    for _ in range(5):
        starts = next(source).sort().values
        assert int(starts[0]) < 10 and bool((starts.diff() == 10).all()) and int(starts[-1]) < 90
