"""Students and their labels: a row never labels itself, and each loss is the one it says it is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs knnext[lm]")
pytest.importorskip("faiss", reason="needs knnext[faiss]")

from knnext.evaluation.bootstrap import Interval
from knnext.experiments import soft_labels
from knnext.experiments.lab import Lab
from knnext.experiments.lab.contrast import Gain
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.leave_one_out import drop_own, row_neighbors
from knnext.experiments.run import run_experiment
from knnext.ops import knn_softmax

OPTIONS = {"soft-labels.blocks": 60, "soft-labels.k": 32, "soft-labels.steps": 0.7}


@pytest.fixture(scope="module")
def lab(tiny_lab: Lab) -> Lab:
    return Lab(replace(tiny_lab.preset, options=OPTIONS), tiny_lab.folder, tiny_lab.say)


@pytest.fixture(scope="module")
def result(lab: Lab) -> dict[str, Any]:
    return run_experiment("soft-labels", lab.preset, lab.folder, lab=lab)


def gain(low: float, high: float) -> Gain:
    return Gain((low + high) / 2, Interval(low, high, 0.95))


def test_only_a_gain_above_hard_labels_disagrees() -> None:
    up, across = gain(0.1, 0.2), gain(-0.1, 0.1)
    assert soft_labels.agreement(gain(-0.1, 0.001), up, 0.0) == "agrees"
    assert soft_labels.agreement(across, up, 0.0) == "undecided"  # nor is a gain ruled out
    assert soft_labels.agreement(gain(math.nan, math.nan), up, 0.0) == "undecided"
    assert soft_labels.agreement(up, across, 0.0) == "agrees in part"
    assert soft_labels.agreement(up, up, 0.0) == "disagrees"


def test_a_student_far_weaker_than_the_base_lm_decides_nothing_by_not_helping() -> None:
    assert soft_labels.agreement(gain(0.0, 0.0), gain(0.0, 0.0), 0.5) == "undecided"
    assert soft_labels.agreement(gain(0.1, 0.2), gain(0.1, 0.2), 0.5) == "disagrees"


def test_a_row_is_dropped_by_its_number_wherever_it_stands() -> None:
    """Row 7 stands behind a double, row 8 was missed, row 9 is first."""
    indices = torch.tensor([[3, 7, 5], [1, 2, 4], [9, 6, -1]])
    distances = torch.tensor([[0.0, 0.0, 2.0], [1.0, 2.0, 3.0], [0.0, 1.0, torch.inf]])
    kept_distances, kept = drop_own(distances, indices, torch.tensor([7, 8, 9]))
    assert kept.tolist() == [[3, 5], [1, 2], [6, -1]]
    assert kept_distances.tolist() == [[0.0, 2.0], [1.0, 2.0], [1.0, torch.inf]]


def test_neighbors_of_a_row_are_those_of_a_datastore_without_it(lab: Lab) -> None:
    store, rows = lab.store("att"), torch.arange(100, 19_000, 900)
    near = row_neighbors(lab, rows, 20, Setting())
    keys = store.keys[0 : len(store)].float()
    squares = torch.cdist(keys[rows], keys).square()
    squares[torch.arange(len(rows)), rows] = torch.inf
    expected = squares.topk(20, largest=False)
    torch.testing.assert_close(near.distances, expected.values, rtol=1e-3, atol=2e-2)
    assert torch.equal(near.rows, rows)
    # A neighbor's token is its row's value; the farther ones may be tied.
    values = store.values[0 : len(store)]
    same = (near.tokens == values[expected.indices].int()).double().mean()
    assert same > 0.95


def test_labels_are_the_teachers_distributions(lab: Lab) -> None:
    """The loss of logits z is the cross-entropy with each teacher's distribution."""
    teacher = soft_labels._teacher(lab)
    schedule, starts = soft_labels._plan(lab)
    at = (starts[:2, None] + torch.arange(schedule.block_size)).flatten()
    base = lab.train_states("ffn").keys[at].float() @ lab.lm().output_embedding.T
    log_z = torch.randn(base.shape).log_softmax(1)

    def loss(labels: str) -> float:
        made = soft_labels.label_loss(lab, labels, starts, schedule.block_size, teacher)
        return float(made(log_z, at))

    p_lm = base.softmax(1)
    assert loss(soft_labels.BASE) == pytest.approx(float(-(p_lm * log_z).sum(1).mean()), rel=1e-4)
    targets = lab.train_states("att").targets[at]
    hard = -log_z.gather(1, targets[:, None]).mean()
    assert loss(soft_labels.HARD) == pytest.approx(float(hard), rel=1e-5)
    near = row_neighbors(lab, _all_positions(starts, schedule), teacher.k, soft_labels._SETTING)
    first = torch.searchsorted(near.rows, at)
    m = teacher.fitted.mixture
    p_knn = knn_softmax(near.distances[first], near.tokens[first], m.temperature, base.shape[1])
    mixed = (1 - m.lmbda) * p_lm + m.lmbda * p_knn
    assert loss(soft_labels.KNN) == pytest.approx(float(-(mixed * log_z).sum(1).mean()), rel=1e-4)


def _all_positions(starts: torch.Tensor, schedule: Any) -> torch.Tensor:
    return (starts[:, None] + torch.arange(schedule.block_size)).flatten()


def test_the_base_lms_loss_on_its_own_labels_is_their_entropy(lab: Lab) -> None:
    """No student can go below it."""
    schedule, starts = soft_labels._plan(lab)
    at = starts[0] + torch.arange(schedule.block_size)
    logits = lab.train_states("ffn").keys[at].float() @ lab.lm().output_embedding.T
    teacher = soft_labels._teacher(lab)
    loss = soft_labels.label_loss(lab, soft_labels.BASE, starts, schedule.block_size, teacher)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    assert float(loss(logits, at)) == pytest.approx(float(entropy), rel=1e-5)
    assert float(loss(logits + torch.randn_like(logits), at)) > float(entropy)


def test_a_student_does_not_start_where_the_base_lm_started(lab: Lab) -> None:
    from knnext.lm.train import new_model

    base = new_model(lab.preset.train, lab.tokenizer).get_input_embeddings().weight
    for seed in lab.preset.seeds:
        student = soft_labels._new_student(lab, seed).get_input_embeddings().weight  # type: ignore
        assert student.shape == base.shape and not torch.equal(student, base)


def test_the_table_has_each_student_by_seed_and_the_teacher(
    result: dict[str, Any], lab: Lab
) -> None:
    rows = result["rows"]
    assert [row["runs"] for row in rows] == [2, 2, 2, 1]
    assert len({tuple(row) for row in rows}) == 1
    base = float((-lab.split("test").log_p_lm.mean()).exp())
    for row in rows:
        assert 0 <= row["lmbda"] <= 1 and row["perplexity"] > 1
        assert row["lmbda"] > 0 or row["perplexity"] == pytest.approx(base)
    assert rows[0]["against hard labels"] == "" != rows[1]["against hard labels"]
    assert rows[0]["std over seeds"] is not None
    assert (lab.folder / "soft-labels.png").stat().st_size > 10_000
