"""knn_softmax against softmax + zeros + scatter_add, eager and compiled, and a bare fill."""

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
    return lambda: knnext.knn_softmax(
        data.distances, data.tokens, data.temperature, data.vocab_size
    )


def eager(data: Data) -> Callable[[], Tensor]:
    return lambda: scattered_softmax(data)


def one_graph(data: Data) -> Callable[[], Tensor]:
    run = compiled(scattered_softmax)
    return lambda: run(data)


def bare_zeros(data: Data) -> Callable[[], Tensor]:
    """No op: the zeros alone."""
    sizes = (data.shape.queries, data.vocab_size)
    return lambda: torch.zeros(sizes, device=data.distances.device)


IMPLEMENTATIONS = {
    "knnext": Implementation(fused, capturable=True),
    "torch_eager": Implementation(eager, capturable=True),
    "torch_compiled": Implementation(one_graph, capturable=True, late=True),
    "bare_zeros": Implementation(bare_zeros, exact=False, capturable=True),
}


def test_knn_softmax(shape: Shape, device: str, implementation: str, measure: Measure) -> None:
    sets = make_data(shape, device, 4 * shape.queries * shape.vocab_size)
    data, chosen = sets[0], IMPLEMENTATIONS[implementation]
    memory = Memory(device, chosen.own_memory)
    runs = [chosen.prepare(each) for each in sets]
    result, facts = memory.watch(runs[0])
    if chosen.exact:
        want = scattered_softmax(data.rows(CHECKED_ROWS))
        torch.testing.assert_close(result[:CHECKED_ROWS].double(), want, rtol=1e-4, atol=1e-6)
    measure(
        runs,
        implementation=chosen,
        work=Work(float(data.output_bytes + data.neighbor_bytes)),
        group=f"knn_softmax {shape}",
        op="knn_softmax",
        shape=str(shape),
        **shape.facts(),
        **facts,
    )
