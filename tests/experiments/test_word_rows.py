"""Rows summed by word: against the dense formula, in values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from knnext.experiments.lab.family import row_log_p
from knnext.experiments.lab.word_rows import Layout, WordRows, even_layout, word_log_p

COUNTS = torch.tensor([1, 3, 2, 1, 4])


def dense(states, rows, layout, targets, logits=None, floor=0.0):
    """M softmax(W h) with M written out, V x R."""
    matrix = torch.zeros(len(layout.counts), layout.num_rows, dtype=states.dtype)
    matrix[layout.row_tokens, torch.arange(layout.num_rows)] = 1
    scores = states @ rows.T + (0 if logits is None else logits)
    p = scores.softmax(1) @ matrix.T
    return p.gather(1, targets[:, None])[:, 0].clamp_min(floor).log()


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, 4, generator=generator, dtype=dtype)
    rows = torch.randn(int(COUNTS.sum()), 4, generator=generator, dtype=dtype)
    logits = torch.randn(7, int(COUNTS.sum()), generator=generator, dtype=dtype)
    return states, rows, logits, torch.tensor([0, 1, 2, 3, 4, 4, 1])


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_dense_formula(frozen):
    states, rows, logits, targets = problem()
    layout, extra = Layout(COUNTS), logits if frozen else None
    states.requires_grad_()
    rows.requires_grad_()

    def ours(states, rows):
        return word_log_p(states, rows, layout, targets, logits=extra)

    assert torch.autograd.gradcheck(ours, (states, rows))
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    for function in (ours, lambda s, r: dense(s, r, layout, targets, extra)):
        (function(states, rows) * weights).sum().backward()
    # Both were added up: each is half.
    only = torch.autograd.grad((ours(states, rows) * weights).sum(), (states, rows))
    torch.testing.assert_close(states.grad, 2 * only[0])
    torch.testing.assert_close(rows.grad, 2 * only[1])


def test_values_with_and_without_gradient_and_of_the_family_are_one():
    states, rows, _, targets = problem(torch.float32)
    layout = Layout(COUNTS)
    expected = dense(states, rows, layout, targets)
    plain = word_log_p(states, rows, layout, targets)
    trained = word_log_p(states, rows.clone().requires_grad_(), layout, targets)
    family = row_log_p(states, rows, targets, row_tokens=layout.row_tokens)
    for found in (plain, trained.detach(), family.float()):
        torch.testing.assert_close(found, expected)


def test_below_the_floor_a_word_counts_as_the_floor_and_gives_no_gradient():
    rows = torch.tensor([[30.0], [0.0], [1.0]], requires_grad=True)
    states, layout = torch.ones(2, 1), Layout(torch.tensor([1, 2]))
    log_p = word_log_p(states, rows, layout, torch.tensor([1, 0]), floor=1e-9)
    assert log_p[0].item() == pytest.approx(math.log(1e-9))
    log_p[0].backward()
    assert not rows.grad.any()
    without = word_log_p(states, rows, layout, torch.tensor([1, 0]))
    without[0].backward()
    assert rows.grad[0, 0] == pytest.approx(-1, abs=1e-6) and rows.grad[1:].sum() > 0.99


def test_a_word_that_underflows_still_pulls_its_own_rows():
    rows = torch.tensor([[200.0], [0.0], [1.0]], requires_grad=True)
    word_log_p(torch.ones(1, 1), rows, Layout(torch.tensor([1, 2])), torch.tensor([1])).backward()
    share = torch.tensor([0.0, 1.0]).softmax(0)
    torch.testing.assert_close(rows.grad[:, 0], torch.cat([torch.tensor([-1.0]), share]))


def test_special_tokens_have_one_row():
    layout = even_layout(5, 3, single=(0, 4))
    assert layout.counts.tolist() == [1, 3, 3, 3, 1]
    assert layout.num_rows == 2 + 3 * (5 - 2)
    assert layout.row_tokens.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_every_word_needs_a_row():
    with pytest.raises(ValueError, match="at least one row"):
        Layout(torch.tensor([1, 0, 2]))


def test_rows_start_with_the_published_spread():
    module = WordRows(even_layout(2000, 2), 64, torch.Generator().manual_seed(0))
    assert float(module.rows.detach().std()) == pytest.approx(64**-0.5, rel=0.02)
