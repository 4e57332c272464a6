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


def load(name: str) -> Any:
    """The module of an experiment. ValueError, with the names there are, for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"experiment must be one of {', '.join(NAMES)}; got {name!r}")
    return importlib.import_module(f"knnext.experiments.{name.replace('-', '_')}")
