"""knn_target_log_prob against the whole row and against logsumexp over the matching neighbors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import knnext
from benchmarks.data.cases import Implementation
from benchmarks.data.mixing import (
    SHAPES_WITHOUT_LOGITS,
    Data,
    Shape,
    compiled,
    make_data,
    scattered_softmax,
)
from benchmarks.timing.measure import Measure, Memory, Work

SHAPES = SHAPES_WITHOUT_LOGITS
CHECKED_ROWS = 8


def fused(data: Data) -> Callable[[], Tensor]:
    rest = (data.tokens, data.targets, data.temperature)
    return lambda: knnext.knn_target_log_prob(data.distances, *rest)


def whole_row(data: Data) -> Tensor:
    return scattered_softmax(data).gather(1, data.targets[:, None]).log()[:, 0]


def whole_row_eager(data: Data) -> Callable[[], Tensor]:
    return lambda: whole_row(data)


def matching(data: Data) -> Tensor:
    log_weights = torch.log_softmax(-data.distances / data.temperature, 1)
    other = data.tokens != data.targets[:, None]
    return log_weights.masked_fill(other, -float("inf")).logsumexp(1)


def matching_eager(data: Data) -> Callable[[], Tensor]:
    return lambda: matching(data)


def matching_compiled(data: Data) -> Callable[[], Tensor]:
    run = compiled(matching)
    return lambda: run(data)


IMPLEMENTATIONS = {
    "knnext": Implementation(fused, capturable=True),
    "torch_whole_row": Implementation(whole_row_eager, capturable=True),
    "torch_masked": Implementation(matching_eager, capturable=True),
    "compiled_masked": Implementation(matching_compiled, capturable=True, late=True),
}


def test_knn_target_log_prob(
    shape: Shape, device: str, implementation: str, measure: Measure
) -> None:
    # Distances as float32, tokens and targets as int64.
    size = shape.queries * (12 * shape.k + 12)
    sets = make_data(shape, device, size)
    data, chosen = sets[0], IMPLEMENTATIONS[implementation]
    memory = Memory(device, chosen.own_memory)
    runs = [chosen.prepare(each) for each in sets]
    result, facts = memory.watch(runs[0])
    want = whole_row(data.rows(CHECKED_ROWS))
    torch.testing.assert_close(result[:CHECKED_ROWS].double(), want, rtol=1e-4, atol=1e-4)
    measure(
        runs,
        implementation=chosen,
        work=Work(float(size), memory="read"),
        group=f"knn_target_log_prob {shape}",
        op="knn_target_log_prob",
        shape=str(shape),
        **shape.facts(),
        **facts,
    )
