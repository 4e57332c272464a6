"""The family's dense members against the formula written out in float64."""

from __future__ import annotations

import pytest
import torch

from knnext.experiments.lab.family import Setting, row_log_p, row_scores


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_scores_have_the_papers_signs(metric):
    states, rows = draw(5, 8), draw(7, 8, seed=1)
    scores = row_scores(states, rows, metric)
    for i in range(5):
        for j in range(7):
            squared = float(((states[i] - rows[j]) ** 2).sum())
            wanted = float(states[i] @ rows[j]) if metric == "ip" else -squared
            assert float(scores[i, j]) == pytest.approx(wanted, abs=1e-4)


def test_one_vector_a_token_is_the_lm_head():
    states, rows, targets = draw(20, 8), draw(11, 8, seed=1), torch.arange(20) % 11
    found = row_log_p(states, rows, targets)
    wanted = (states @ rows.T).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found, wanted.double(), atol=1e-5, rtol=0)


def test_rows_of_a_token_are_summed():
    states, rows = draw(6, 8), draw(10, 8, seed=1)
    row_tokens = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    found = row_log_p(states, rows, targets, row_tokens=row_tokens, temperature=2.0)
    p = (states.double() @ rows.double().T / 2).softmax(1)
    wanted = torch.stack([p[i, row_tokens == t].sum() for i, t in enumerate(targets.tolist())])
    torch.testing.assert_close(found.exp(), wanted, atol=1e-6, rtol=1e-5)
    everything = sum(
        row_log_p(states, rows, torch.full((6,), t), row_tokens=row_tokens).exp() for t in range(5)
    )
    torch.testing.assert_close(everything, torch.ones(6, dtype=torch.float64))


def test_a_soft_matrix_of_one_hot_columns_is_the_one_hot_member():
    states, rows = draw(6, 8), draw(10, 8, seed=1)
    row_tokens = torch.arange(10) % 4
    m = torch.nn.functional.one_hot(row_tokens, 4).float().T  # (V, R)
    targets = torch.arange(6) % 4
    soft = row_log_p(states, rows, targets, row_distribution=lambda t: m[t], metric="l2")
    hard = row_log_p(states, rows, targets, row_tokens=row_tokens, metric="l2")
    torch.testing.assert_close(soft, hard)


def test_a_token_without_rows_is_impossible():
    found = row_log_p(draw(3, 4), draw(2, 4, seed=1), torch.tensor([0, 1, 5]))
    assert found[2] == -torch.inf
    assert found[:2].isfinite().all()


def test_blocks_change_nothing(monkeypatch):
    states, rows, targets = draw(50, 8), draw(11, 8, seed=1), torch.arange(50) % 11
    whole = row_log_p(states, rows, targets)
    monkeypatch.setattr("knnext.experiments.lab.family._BLOCK_ENTRIES", 33)
    torch.testing.assert_close(row_log_p(states, rows, targets), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "bad",
    [{"mask": "real"}, {"metric": "cosine"}, {"fraction": 0.0}, {"padding": 1.0}, {"m": "hard"}],
)
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Setting(**bad)


def test_temperature_zero_is_refused():
    with pytest.raises(ValueError, match="temperature must be positive"):
        row_log_p(draw(2, 4), draw(3, 4), torch.tensor([0, 1]), temperature=0.0)
