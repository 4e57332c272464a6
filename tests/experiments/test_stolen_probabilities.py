"""Classes that no state can make the argmax: planted ones are found, and only those."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("scipy", reason="needs scipy")

from knnext.experiments.lab import Lab
from knnext.experiments.lab.argmax_classes import is_argmax, settle_classes
from knnext.experiments.run import run_experiment
from knnext.experiments.stolen_probabilities import agreement

SQUARE = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def zero_bias(weight: Tensor) -> Tensor:
    return torch.zeros(len(weight), dtype=torch.float64)


@pytest.mark.parametrize("guesses", [True, False])
def test_the_corners_of_a_square_are_free_and_its_middle_is_stolen(guesses: bool) -> None:
    weight = torch.cat([SQUARE, torch.tensor([[0.2, -0.3]])])
    settled = settle_classes(weight, guesses=guesses)
    assert settled.stages[4] == "stolen" and "stolen" not in settled.stages[:4]
    assert settled.count("open") == 0 and settled.proven == 1


def test_a_point_on_an_edge_is_stolen_and_one_just_outside_is_not() -> None:
    def stage(x: float) -> str:
        weight = torch.cat([SQUARE, torch.tensor([[x, 0.0]])])
        return settle_classes(weight, classes=torch.tensor([4])).stages[0]

    assert stage(1.0) == "stolen"
    assert stage(1.001) not in ("stolen", "open")


def test_two_equal_rows_steal_from_each_other() -> None:
    weight = torch.cat([SQUARE, SQUARE[:1]])
    settled = settle_classes(weight)
    assert [settled.stages[i] for i in (0, 4)] == ["stolen", "stolen"]
    assert "stolen" not in settled.stages[1:4]


def test_a_bias_frees_the_middle_and_can_bury_a_corner() -> None:
    weight = torch.cat([SQUARE, torch.zeros(1, 2)])
    freed = settle_classes(weight, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1]))
    assert freed.count("stolen") == 0
    kept = settle_classes(weight, torch.tensor([0.0, 0.0, 0.0, 0.0, -0.1]))
    assert kept.stages[4] == "stolen"
    # A corner leads by at most 2 * 100 over its neighbour within the bound.
    buried = settle_classes(SQUARE, torch.tensor([-201.0, 0.0, 0.0, 0.0]))
    assert buried.stages[0] == "stolen" and buried.proven == 0  # the bound's doing, no hull
    assert settle_classes(SQUARE, torch.tensor([-199.0, 0.0, 0.0, 0.0])).count("stolen") == 0


def test_in_a_high_dimension_planted_means_are_found_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(1)
    outer = torch.randn(200, 12, generator=generator).double()
    shares = torch.rand(6, 200, generator=generator).double() ** 8
    inner = (shares / shares.sum(1, keepdim=True)) @ outer
    settled = settle_classes(torch.cat([outer, inner]), steps=20)
    assert settled.stages[200:] == ["stolen"] * 6
    assert settled.proven == settled.count("stolen") and settled.count("open") == 0
    exact = settle_classes(torch.cat([outer, inner]), guesses=False)
    free = [stage != "stolen" for stage in settled.stages]
    assert free == [stage != "stolen" for stage in exact.stages]


def test_points_on_a_circle_are_all_free_and_those_within_are_not() -> None:
    angles = torch.arange(60, dtype=torch.float64) * (2 * math.pi / 60)
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    settled = settle_classes(torch.cat([circle, 0.99 * circle]))
    assert "stolen" not in settled.stages[:60]
    # Midway between corners the polygon is at cos(3 degrees) = 0.9986, so 0.99 is inside.
    assert settled.stages[60:] == ["stolen"] * 60


def test_each_witness_wins_its_argmax() -> None:
    weight = torch.randn(300, 6, generator=torch.Generator().manual_seed(2)).double()
    settled = settle_classes(weight)
    free = torch.tensor([stage not in ("stolen", "open") for stage in settled.stages])
    states, classes = settled.states[free], settled.classes[free]
    assert 0 < len(classes) < 300
    assert torch.equal((states @ weight.T).argmax(1), classes)
    assert bool(is_argmax(weight, zero_bias(weight), states, classes).all())
    assert bool(settled.states[~free].isnan().all()) and float(states.abs().max()) <= 100 + 1e-9


def test_a_bias_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        settle_classes(SQUARE, torch.zeros(3))


def test_only_a_complete_test_that_found_its_planted_words_agrees() -> None:
    none = {"stolen": 0, "open": 0}
    found, missed = {"stolen": 8, "tested": 8}, {"stolen": 7, "tested": 8}
    assert agreement(none, found) == "agrees"
    assert agreement(none, missed) == "undecided"
    assert agreement({"stolen": 0, "open": 1}, found) == "undecided"
    assert agreement({"stolen": 1, "open": 0}, found) == "disagrees"


def test_on_the_tiny_lm_every_class_is_settled_and_counted(tiny_lab: Lab) -> None:
    options = {"stolen-probabilities.sample": 16, "stolen-probabilities.planted": 3}
    lab = Lab(replace(tiny_lab.preset, options=options), tiny_lab.folder, tiny_lab.say)
    result = run_experiment("stolen-probabilities", lab.preset, lab.folder, lab=lab)
    whole, exact, planted, *cut = result["rows"]
    names = ["x = W_i", "x = W_i - mean", "reflection", "linear program", "stolen", "open"]
    assert all(sum(row[name] for name in names) == row["tested"] for row in result["rows"])
    assert whole["tested"] == whole["classes"] == 512 and planted["stolen"] == 3
    assert exact["linear program"] + exact["stolen"] == exact["tested"]
    assert cut[0]["dimensions"] == 2 and cut[0]["stolen"] > 8
    data = result["details"]["data"]
    assert sum(data["argmax counts"]) == sum(data["target counts"]) == data["states"]
    assert (lab.folder / "stolen-probabilities.png").stat().st_size > 10_000
