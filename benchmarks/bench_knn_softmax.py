"""knn_softmax against softmax + zeros + scatter_add, eager and compiled, and a bare fill."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mixing_data import SHAPES, Data, make_data, scattered_softmax
from torch import Tensor

import knnext

__all__ = ["SHAPES"]


def fused(data: Data) -> Callable[[], Tensor]:
    return lambda: knnext.knn_softmax(
        data.distances, data.tokens, data.temperature, data.vocab_size
    )


def eager(data: Data) -> Callable[[], Tensor]:
    return lambda: scattered_softmax(data)


def compiled(data: Data) -> Callable[[], Tensor]:
    run = torch.compile(scattered_softmax)
    return lambda: run(data)


def bare_fill(data: Data) -> Callable[[], Tensor]:
    """No op: the zeros alone."""
    sizes = (data.shape.queries, data.vocab_size)
    return lambda: torch.zeros(sizes, device=data.distances.device)


IMPLEMENTATIONS = {
    "knnext": fused,
    "torch_eager": eager,
    "torch_compiled": compiled,
    "bare_zeros": bare_fill,
}


def test_knn_softmax(shape, device: str, implementation: str, measure) -> None:
    data = make_data(shape, device)
    run = IMPLEMENTATIONS[implementation](data)
    if implementation != "bare_zeros":
        torch.testing.assert_close(run(), fused(data)(), rtol=1e-4, atol=1e-6)
    group = f"knn_softmax {shape} {device}"
    measure(run, group=group, device=device, bytes_moved=data.output_bytes, shape=str(shape))
