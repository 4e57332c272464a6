"""Who benefits: features by hand, buckets that add up, a planted benefit, and a tiny run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from knnext.corpus import TokenizedDocuments
from knnext.evaluation.perplexity import TextCounts
from knnext.experiments import who_benefits
from knnext.experiments.lab.correlation import spearman
from knnext.experiments.lab.figures import new_figure
from knnext.experiments.lab.mixture import Split
from knnext.experiments.lab.token_features import (
    bigram_entropies,
    decades,
    frequencies,
    quantile_buckets,
    seen_share,
)
from knnext.experiments.run import run_experiment


def text(*documents):
    lengths = [len(d) for d in documents]
    offsets = np.cumsum([0, *lengths])
    return TokenizedDocuments(
        tokens=np.concatenate([np.array(d, dtype=np.int32) for d in documents]),
        document_offsets=offsets,
        names=[str(i) for i in range(len(documents))],
        num_words=np.zeros(len(documents), np.int64),
        num_bytes=np.zeros(len(documents), np.int64),
    )


def test_frequencies_and_decades():
    tokens = np.array([1, 1, 2, 1], dtype=np.int32)
    assert frequencies(tokens, 4).tolist() == [0, 3, 1, 0]
    counts = torch.tensor([0, 1, 9, 10, 99, 100, 1_000_000])
    assert decades(counts).tolist() == [0, 1, 1, 2, 2, 3, 7]


def test_bigram_entropies_by_hand():
    # 0 is followed by 1, 2, 1, 2; 1 by 0, 0; 2 by 0 alone, as the stream ends with it.
    follows, precedes = bigram_entropies(np.array([0, 1, 0, 2, 0, 1, 0, 2], dtype=np.int32), 4)
    assert follows.tolist() == pytest.approx([math.log(2), 0, 0, 0])
    # Before 0 stand 1, 2 and 1.
    third = -(2 / 3) * math.log(2 / 3) - math.log(1 / 3) / 3
    assert precedes.tolist() == pytest.approx([third, 0, 0, 0])


def test_entropy_of_many_even_successors():
    tokens = np.array([x for i in range(1, 9) for x in (0, i)], dtype=np.int32)
    follows, precedes = bigram_entropies(tokens, 9)
    assert float(follows[0]) == pytest.approx(math.log(8))
    assert float(precedes[0]) == pytest.approx(math.log(7))


def test_seen_share_counts_places_within_documents():
    train = text([0, 1, 2, 3], [0, 5, 6])
    # (1, 2), (2, 3) and again (1, 2) are seen; (3, 1) is not; (3, 0) would lie across documents.
    found = seen_share(text([1, 2, 3, 1, 2], [0, 6], [4]), train, 2, 10)
    assert found[0] == pytest.approx(3 / 4)
    assert found[1] == 0
    assert found[2].isnan()
    assert seen_share(train, train, 3, 10).tolist() == [1, 1]


def test_ngrams_across_documents_of_training_are_not_known():
    train = text([1, 2], [3, 4])
    assert seen_share(text([2, 3]), train, 2, 10).item() == 0


def test_seen_share_of_a_large_vocabulary_is_exact():
    """Codes that differ in the first token only, though V^n is past 64 bits."""
    size = 1 << 18
    assert seen_share(text([7, 1, 2, 3]), text([9, 1, 2, 3]), 4, size).item() == 0
    assert seen_share(text([7, 1, 2, 3]), text([7, 1, 2, 3]), 4, size).item() == 1


def test_quantile_buckets_do_not_part_equal_values():
    assert quantile_buckets(torch.arange(10.0), 5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    values = torch.tensor([5.0, 1, 1, 1, 1, 1, 1, 9])
    assert quantile_buckets(values, 4).tolist() == [3, 0, 0, 0, 0, 0, 0, 3]


@pytest.fixture(scope="module")
def planted():
    """A kNN that helps odd tokens by half a nat and harms even ones by a tenth."""
    count = 2000
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(10, (count,), generator=generator)
    log_p_lm = -1 - torch.rand(count, generator=generator, dtype=torch.float64)
    documents = torch.arange(count) * 25 // count
    split = Split("test", log_p_lm, targets, documents, TextCounts(count, None, None, 25))
    return split, log_p_lm + torch.where(targets % 2 == 1, 0.5, -0.1)


def test_buckets_find_who_was_helped(planted):
    split, log_p = planted
    odd = (split.targets % 2).double()
    feature = who_benefits.Feature(odd, odd.long(), {0: "even", 1: "odd"})
    even_row, odd_row = who_benefits.bucket_rows(
        "parity", feature, split, log_p, (log_p > split.log_p_lm).double(), 100
    )
    assert even_row["gain"] == pytest.approx(-0.1)
    assert odd_row["gain"] == pytest.approx(0.5)
    assert odd_row["low"] == pytest.approx(0.5)
    assert (even_row["kNN beats LM"], odd_row["kNN beats LM"]) == (0, 1)
    assert even_row["tokens"] + odd_row["tokens"] == len(odd)
    assert even_row["share of the whole gain"] + odd_row[
        "share of the whole gain"
    ] == pytest.approx(1)
    gain = (log_p - split.log_p_lm).round(decimals=6)
    assert spearman(odd, gain, split.document_ids).value == pytest.approx(1)


@pytest.fixture(scope="module")
def result(tiny_lab):
    preset = replace(
        tiny_lab.preset,
        options={"who-benefits.temperatures": (2.0,), "who-benefits.min_occurrences": 3},
    )
    tiny_lab.preset = preset
    try:
        yield run_experiment(
            "who-benefits", preset, tiny_lab.folder, lab=tiny_lab, say=lambda _line: None
        )
    finally:
        tiny_lab.preset = replace(preset, options={})


def test_every_token_is_in_one_bucket_of_each_feature(result, tiny_lab):
    tokens, gains, shares = {}, {}, {}
    for row in result["series"]["rows"]:
        tokens[row["by"]] = tokens.get(row["by"], 0) + row["tokens"]
        gains[row["by"]] = gains.get(row["by"], 0) + row["tokens"] * row["gain"]
        shares[row["by"]] = shares.get(row["by"], 0) + row["share of the whole gain"]
    count = tiny_lab.split("test").counts.tokens
    assert len(tokens) == 6
    assert set(tokens.values()) == {count}
    for total in gains.values():
        assert total / count == pytest.approx(result["details"]["all"]["value"], abs=1e-9)
    assert list(shares.values()) == pytest.approx([1] * 6)


def test_the_log_holds_every_token_with_its_features(result, tiny_lab):
    lines = (tiny_lab.folder / result["details"]["token log"]).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    split = tiny_lab.split("test")
    assert len(rows) == split.counts.tokens
    assert [r["token"] for r in rows] == split.targets.tolist()
    counts = np.bincount(tiny_lab.text("train").tokens, minlength=600)
    assert [r["training frequency"] for r in rows] == counts[split.targets.numpy()].tolist()
    gain = sum(r["log_p"] - r["log_p_lm"] for r in rows) / len(rows)
    assert gain == pytest.approx(result["details"]["all"]["value"], abs=1e-6)


def test_entropy_of_the_lm_is_bounded(result, tiny_lab):
    features = who_benefits.token_features(tiny_lab, tiny_lab.split("test"))
    values = features[who_benefits.UNSURE].values
    assert 0 < float(values.min()) < float(values.max()) <= math.log(512) + 1e-4
    share = features[who_benefits.SEEN].values
    assert 0 <= float(share.min()) < float(share.max()) <= 1


def test_the_figure_draws(result):
    figure, axes = new_figure()
    who_benefits.plot(result, axes)
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == 6
    # A bar of one panel is as long as its like in another.
    assert len({axes.get_xlim() for axes in panels}) == 1
    assert result["agreement"] == "undecided"


@pytest.mark.parametrize(
    ("feature", "bucket", "words"),
    [
        (who_benefits.FREQUENCY, "0", "0"),
        (who_benefits.FREQUENCY, "1+", "1 to 9"),
        (who_benefits.FREQUENCY, "10,000+", "10,000 to 99,999"),
        (who_benefits.GIVEN, "8.5e-07 to 0.0002", "up to 0.0002"),
        (who_benefits.GIVEN, "0.0002 to 0.0006", "0.0002 to 0.0006"),
        (who_benefits.UNSURE, "0.083 to 4", "up to 4"),
        (who_benefits.FOLLOWS, "0 to 3.3", "up to 3.3"),
        (who_benefits.SEEN, "0.08 to 0.21", "8 to 21"),
        (who_benefits.SEEN, "0", "0"),
    ],
)
def test_buckets_are_said_in_words(feature, bucket, words):
    assert who_benefits._bucket(feature, bucket) == words


def test_one_document_has_a_headline():
    row = {"by": who_benefits.SEEN, "bucket": "0.5 to 0.5", "change of perplexity": "-1.0 %"}
    assert who_benefits._headline([row]) == "-1.0 % with 0.5 to 0.5 of n-grams seen in training"
    assert "nan" not in who_benefits._spread(torch.zeros(20))
    assert "2.0 times" in who_benefits._spread(torch.tensor([2.0, *[0.0] * 8, -1.0]))
