"""The names of the experiments, in the order in which they run and are reported."""

from __future__ import annotations

import importlib
from typing import Any

NAMES: tuple[str, ...] = (
    "representation",
    "learned-embedding",
    "multi-embedding",
    "mixture-of-softmaxes",
    "logit-sum",
    "datastore-size",
    "temperature",
    "approximation",
    "padding",
    "sparsification",
    "stolen-probabilities",
    "memorization",
    "soft-labels",
    "clustering",
    "ensembling",
    "objectives",
    "who-benefits",
)

#: What `--set NAME.OPTION=JSON` can set; defaults are in the modules. A misspelt name would be a
#: setting that nothing reads.
OPTIONS: dict[str, tuple[str, ...]] = {
    "representation": ("temperatures",),
    "learned-embedding": ("steps", "batch_size", "learning_rate"),
    "multi-embedding": ("rows", "uneven", "steps", "batch_size", "learning_rate"),
    "mixture-of-softmaxes": (
        *("components", "with_output"),
        *("steps", "batch_size", "learning_rate"),
    ),
    "logit-sum": ("steps", "batch_size", "learning_rate"),
    "datastore-size": ("fractions", "temperatures"),
    "temperature": ("fractions", "wide"),
    "approximation": (
        *("fractions", "nprobes", "codes", "parts"),
        *("temperatures", "all_lists_below"),
    ),
    "padding": (
        *("fractions", "share", "nprobes", "temperatures"),
        *("mean_shares", "moved_temperatures"),
    ),
    "sparsification": ("kept", "lm_temperatures", "temperatures"),
    "stolen-probabilities": ("sample", "planted", "exact", "reflections"),
    "memorization": ("tokens", "epochs", "batch_size", "learning_rate", "seed"),
    "soft-labels": ("k", "blocks", "steps", "batch_size"),
    "clustering": ("rows_per_word", "sample", "iterations", "steps", "learning_rate"),
    "ensembling": ("seed", "temperatures"),
    "objectives": ("rows", "sample"),
    "who-benefits": ("ngram", "min_occurrences", "temperatures"),
}


def load(name: str) -> Any:
    """The module of an experiment. ValueError, with the names there are, for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"experiment must be one of {', '.join(NAMES)}; got {name!r}")
    return importlib.import_module(f"knnext.experiments.{name.replace('-', '_')}")
