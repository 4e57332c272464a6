"""Evaluations as rows of the results table."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from knnext.evaluation import Evaluation
from knnext.report.table import Row


def table_rows(
    evaluations: Mapping[str, Evaluation],
    sizes: Mapping[str, int],
    words: Mapping[str, str] | None = None,
) -> list[Row]:
    """The base and each system, from evaluations of one text; `words` say what a name means."""
    words = words or {}
    first = next(iter(evaluations.values()))
    base = Row(
        "base LM",
        first.base.token,
        (first.base.interval.low, first.base.interval.high),
        tokens_per_second=first.tokens_per_second.get("lm"),
        num_bytes=sizes.get("base LM"),
        num_documents=first.num_documents,
        words=words.get("base LM", ""),
    )
    return [
        base,
        *(
            table_row(name, one, sizes.get(name), words.get(name, ""))
            for name, one in evaluations.items()
        ),
    ]


def table_row(name: str, evaluation: Evaluation, num_bytes: int | None, words: str = "") -> Row:
    """One mixture against its base."""
    difference = torch.tensor(
        [
            evaluation.log_ppl_difference,
            evaluation.difference_interval.low,
            evaluation.difference_interval.high,
        ],
        dtype=torch.float64,
        device="cpu",
    )
    change, low, high = torch.expm1(difference).tolist()
    return Row(
        name,
        evaluation.mixture.token,
        (evaluation.mixture.interval.low, evaluation.mixture.interval.high),
        change,
        (low, high),
        evaluation.temperature,
        evaluation.lmbda,
        evaluation.tokens_per_second["total"],
        num_bytes,
        evaluation.num_documents,
        words,
    )
