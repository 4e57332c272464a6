"""multi-embedding: allocations by count, capacity on a planted case, and the tiny run."""

from __future__ import annotations

import pytest
import torch

from knnext.evaluation.bootstrap import Interval
from knnext.experiments.lab.examples import Examples, train_log_p_lm
from knnext.experiments.lab.figures import new_figure
from knnext.experiments.lab.recovery import Replacement
from knnext.experiments.lab.training import Schedule, log_p, train
from knnext.experiments.lab.word_rows import PUBLISHED_FLOOR, WordRows, even_layout
from knnext.experiments.multi_embedding import judge, plot, uneven_counts, variants, word_weights
from knnext.experiments.run import run_experiment


def test_rows_follow_the_logarithm_of_the_weight():
    weights = torch.tensor([0.0, 1, 9, 10, 99, 100, 1000])
    # Base 10 gives 1, 1, 1, 2, 2, 3, 4 rows: 14 in all.
    assert uneven_counts(weights, 14).tolist() == [1, 1, 1, 2, 2, 3, 4]
    assert uneven_counts(weights, 14, special=(6,)).tolist()[6] == 1


@pytest.mark.parametrize("total", [200, 400, 1000])
def test_the_total_is_met_from_below_and_nearly(total):
    weights = torch.rand(200, generator=torch.Generator().manual_seed(0)).double() * 1e4
    counts = uneven_counts(weights, total)
    assert total * 0.97 <= int(counts.sum()) <= total
    assert torch.equal(counts, counts.clamp_min(1))
    order = weights.argsort()
    assert torch.equal(counts[order], counts[order].sort().values)  # never fewer for more weight


def test_a_total_below_one_row_a_word_is_refused():
    with pytest.raises(ValueError, match="at least one row a word"):
        uneven_counts(torch.ones(5), 4)


def exclusive_or(count, seed):
    """Word 0 after equal signs, word 1 after unequal ones: no single row a word can tell."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (count, 2), generator=generator) * 2.0 - 1
    states = torch.cat([signs, torch.ones(count, 1)], 1)
    return Examples((states,), (signs[:, 0] != signs[:, 1]).long())


@pytest.mark.parametrize(("rows", "solved"), [(1, False), (2, True)])
def test_two_rows_a_word_separate_what_one_cannot(rows, solved):
    examples = exclusive_or(512, 0)
    module = WordRows(even_layout(2, rows), 3, torch.Generator().manual_seed(3), PUBLISHED_FLOOR)
    train(module, examples, examples, Schedule(200, 128, 0.1))
    loss = -float(log_p(module, examples).mean())
    assert loss < 0.1 if solved else loss == pytest.approx(0.693, abs=0.02)


def replacement(share, gain_low=0.1):
    interval = Interval(gain_low, 0.3, 0.95)
    return Replacement([], torch.zeros(0), 0.2, interval, share, interval, 0.0)


@pytest.mark.parametrize(
    ("share", "lows", "expected"),
    [
        (0.5, (-0.01, -0.01), "agrees"),
        (0.5, (0.01, -0.01), "agrees in part"),
        (0.9, (-0.01, -0.01), "agrees in part"),
        (0.9, (-0.01, 0.01), "disagrees"),
    ],
)
def test_the_verdict_joins_half_the_gain_and_no_further_help(share, lows, expected):
    steps = [Interval(low, 0.02, 0.95) for low in lows]
    assert judge(replacement(share), steps, replacement(1)) == expected
    assert judge(replacement(share), steps, replacement(1, -0.1)) == "undecided"


def test_the_lms_loss_on_the_store_is_its_own(tiny_lab):
    log_p_lm = train_log_p_lm(tiny_lab)
    lm = tiny_lab.lm()
    states = tiny_lab.train_states("ffn")
    logits = states.keys[100:110].float() @ lm.output_embedding.T
    expected = logits.log_softmax(1).gather(1, states.targets[100:110, None])[:, 0]
    torch.testing.assert_close(log_p_lm[100:110], expected, atol=1e-4, rtol=1e-4)
    weights = word_weights(tiny_lab, 512)
    assert int(weights["by frequency"].sum()) == len(tiny_lab.store())
    assert float((weights["by loss"] - 1).sum()) == pytest.approx(-float(log_p_lm.sum()), rel=1e-4)


@pytest.mark.slow
def test_it_runs_and_what_it_says_is_consistent(tiny_lab):
    result = run_experiment(
        "multi-embedding", tiny_lab.preset, tiny_lab.folder, lab=tiny_lab, say=lambda _line: None
    )
    every = variants(tiny_lab)
    assert len(result["rows"]) == len(every) + 3  # two trained longer, and the kNN-LM
    special = len(tiny_lab.tokenizer.all_special_ids)
    for variant, row in zip(every, result["rows"], strict=False):
        assert row["oracle"] <= row["mixture"] and 0 <= row["lmbda"] <= 1
        if variant.by == "even":
            assert row["rows"] == variant.rows * (512 - special) + special
        else:
            assert row["rows"] <= 3 * 512 and row["allocation"].startswith("by ")
    figure, axes = new_figure()
    plot(result, axes)
    assert len(axes.lines) == 5 and figure is axes.figure
