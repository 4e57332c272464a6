"""The bootstrap over documents, where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from knnext.evaluation.bootstrap import percentile_interval, resample_means


def test_bootstrap_of_a_known_case() -> None:
    """Documents of one token each: the mean's deviation is sigma / sqrt(n)."""
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 2.0, size=(400, 1))
    means = resample_means(values, np.ones(400, dtype=np.int64), resamples=4000, seed=1)[:, 0]
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.05)
    interval = percentile_interval(means)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)


def test_bootstrap_draws_whole_documents() -> None:
    """Two documents have three possible draws, and the weights are tokens."""
    means = resample_means(np.array([[10.0], [2.0]]), np.array([10, 1]), resamples=2000, seed=0)[
        :, 0
    ]
    found, counts = np.unique(means.round(9), return_counts=True)
    np.testing.assert_allclose(found, [1.0, 12 / 11, 2.0])
    np.testing.assert_allclose(counts / 2000, [0.25, 0.5, 0.25], atol=0.04)


def test_bootstrap_is_paired_and_seeded() -> None:
    rng = np.random.default_rng(0)
    sums = rng.normal(size=(50, 1)) * 100
    both = np.hstack([sums, sums + 1.0])
    counts = np.ones(50, dtype=np.int64)
    means = resample_means(both, counts, resamples=100, seed=3)
    # Wildly different draws, and the difference is the same in each of them.
    assert means[:, 0].std() > 5
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 1.0)
    assert np.array_equal(means, resample_means(both, counts, resamples=100, seed=3))
    assert not np.array_equal(means, resample_means(both, counts, resamples=100, seed=4))


def test_bootstrap_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = np.arange(20.0)[:, None], np.arange(1, 21)
    want = resample_means(sums, counts, resamples=57, seed=0)
    monkeypatch.setattr("knnext.evaluation.bootstrap._BLOCK_ENTRIES", 100)
    assert np.array_equal(want, resample_means(sums, counts, resamples=57, seed=0))


def test_intervals_skip_empty_draws_and_refuse_infinity() -> None:
    samples = np.array([1.0, 2.0, 3.0, np.nan])
    assert percentile_interval(samples, 0.5).low == pytest.approx(1.5)
    assert np.isnan(percentile_interval(np.array([1.0, np.inf])).low)
    assert np.isnan(percentile_interval(np.empty(0)).high)


def test_bad_arguments_are_named() -> None:
    one = np.ones((3, 1)), np.ones(3, dtype=np.int64)
    with pytest.raises(ValueError, match="resamples"):
        resample_means(*one, resamples=0)
    with pytest.raises(ValueError, match=r"\(documents, m\)"):
        resample_means(one[0][:, 0], one[1])
    with pytest.raises(ValueError, match="positive weight"):
        resample_means(one[0], np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match="level"):
        percentile_interval(np.ones(3), 1.0)
