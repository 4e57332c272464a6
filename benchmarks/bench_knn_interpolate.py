"""knn_interpolate against log_softmax + scattered softmax + log + logaddexp, and log_softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import knnext
from benchmarks.data.cases import Implementation
from benchmarks.data.mixing import SHAPES, Data, Shape, compiled, make_data, scattered_softmax
from benchmarks.timing.measure import Measure, Memory, Work

__all__ = ["SHAPES"]
CHECKED_ROWS = 8


def mixture(data: Data, p_knn: Tensor) -> Tensor:
    log_p_lm = torch.log_softmax(data.logits.to(p_knn.dtype), 1) + math.log1p(-data.lmbda)
    return torch.logaddexp(log_p_lm, p_knn.log() + math.log(data.lmbda))


def fused(data: Data) -> Callable[[], Tensor]:
    rest = (data.distances, data.tokens, data.temperature, data.lmbda)
    return lambda: knnext.knn_interpolate(data.logits, *rest)


def eager(data: Data) -> Callable[[], Tensor]:
    return lambda: mixture(data, scattered_softmax(data))


def in_probabilities(data: Data) -> Callable[[], Tensor]:
    """Not the same op: a small p_knn is lost. What users write who do without log space."""

    def run() -> Tensor:
        p_lm = torch.softmax(data.logits.float(), 1)
        return (p_lm.mul_(1 - data.lmbda).add_(scattered_softmax(data), alpha=data.lmbda)).log_()

    return run


def two_graphs(data: Data) -> Callable[[], Tensor]:
    """Two graphs: as one, torch 2.13's CPU compiler gives wrong values where neighbors are."""
    scatter, mix = compiled(scattered_softmax), compiled(mixture)
    return lambda: mix(data, scatter(data))


def bare_log_softmax(data: Data) -> Callable[[], Tensor]:
    """No op: the LM alone."""
    return lambda: torch.log_softmax(data.logits, 1, dtype=torch.float32)


IMPLEMENTATIONS = {
    "knnext": Implementation(fused, capturable=True),
    "torch_eager": Implementation(eager, capturable=True),
    "torch_probabilities": Implementation(in_probabilities, capturable=True),
    "torch_compiled": Implementation(two_graphs, capturable=True, late=True),
    "bare_log_softmax": Implementation(bare_log_softmax, exact=False, capturable=True),
}


def test_knn_interpolate(shape: Shape, device: str, implementation: str, measure: Measure) -> None:
    size = shape.queries * shape.vocab_size * (4 + shape.logits.itemsize)
    sets = make_data(shape, device, size, with_logits=True)
    data, chosen = sets[0], IMPLEMENTATIONS[implementation]
    memory = Memory(device, chosen.own_memory)
    runs = [chosen.prepare(each) for each in sets]
    result, facts = memory.watch(runs[0])
    if chosen.exact:
        head = data.rows(CHECKED_ROWS)
        want = mixture(head, scattered_softmax(head))
        torch.testing.assert_close(result[:CHECKED_ROWS].double(), want, rtol=1e-4, atol=1e-4)
    measure(
        runs,
        implementation=chosen,
        work=Work(float(size + data.neighbor_bytes)),
        group=f"knn_interpolate {shape}",
        op="knn_interpolate",
        shape=str(shape),
        **shape.facts(),
        **facts,
    )
