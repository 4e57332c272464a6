"""Jobs and machines for the tests of plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from knnext.planning.job import Job
from knnext.planning.model_shape import described
from knnext.planning.rates import Rates
from knnext.planning.stated import STATED

#: The paper's model and datastore: 16 layers, width 1,024, 112.7 million rows that hold data.
PAPER = Job(112_733_184, described(1024, 16, 269.8e6), gpus=1, k=1024)


def job(**changes: Any) -> Job:
    return replace(PAPER, **changes)


def rates(name: str = "h200", **changes: float) -> Rates:
    """Stated ones, some of them others."""
    found = STATED[name]
    values = {key: replace(found.rates[key], value=value) for key, value in changes.items()}
    return replace(found, rates={**found.rates, **values})


def machine(found: Rates, **changes: Any) -> Rates:
    return replace(found, machine=replace(found.machine, **changes))
