"""Correlations against known values, and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from knnext.experiments.lab.correlation import pearson, ranks, spearman

DOCUMENTS = torch.arange(400) // 10


def draw(seed: int) -> torch.Tensor:
    return torch.randn(400, generator=torch.Generator().manual_seed(seed)).double()


def test_pearson_is_numpys_and_lies_in_its_interval() -> None:
    x = draw(1)
    y = 0.6 * x + 0.8 * draw(2) + 1e6  # a mean that would eat the digits of raw sums
    found = pearson(x, y, DOCUMENTS)
    assert found.value == pytest.approx(np.corrcoef(x, y - 1e6)[0, 1], abs=1e-6)
    assert found.interval.low < 0.6 < found.interval.high
    assert found.interval.high - found.interval.low < 0.25


def test_one_document_has_no_interval() -> None:
    x = draw(1)
    assert str(pearson(x, x, torch.zeros(400, dtype=torch.int64))) == "1.00"
    assert str(pearson(x, x, DOCUMENTS)) == "1.00 [1.00, 1.00]"


def test_a_line_correlates_fully_and_a_constant_not_at_all() -> None:
    x = draw(1)
    assert pearson(x, -3 * x + 1, DOCUMENTS).value == pytest.approx(-1)
    assert math.isnan(pearson(x, torch.ones(400), DOCUMENTS).value)


def test_spearman_sees_only_the_order() -> None:
    x = draw(1)
    assert spearman(x, x.exp(), DOCUMENTS).value == pytest.approx(1)
    assert pearson(x, x.exp() ** 3, DOCUMENTS).value < 0.8
    assert abs(spearman(x, draw(2), DOCUMENTS).value) < 0.15


def test_equal_values_share_their_mean_rank() -> None:
    found = ranks(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0]))
    assert found.tolist() == [3.0, 0.0, 3.0, 1.0, 3.0]


def test_documents_that_agree_within_widen_the_interval() -> None:
    """One value a document: 40 observations and not 400."""
    x, y = draw(1)[:40].repeat_interleave(10), draw(2)[:40].repeat_interleave(10)
    by_document = pearson(x, y, DOCUMENTS).interval
    by_token = pearson(x, y, torch.arange(400)).interval
    assert by_document.high - by_document.low > 2 * (by_token.high - by_token.low)
