"""knn_target_log_prob against the whole row and against logsumexp over the matching neighbors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mixing_data import SHAPES, Data, make_data, scattered_softmax
from torch import Tensor

import knnext

__all__ = ["SHAPES"]


def fused(data: Data) -> Callable[[], Tensor]:
    rest = (data.tokens, data.targets, data.temperature)
    return lambda: knnext.knn_target_log_prob(data.distances, *rest)


def whole_row(data: Data) -> Callable[[], Tensor]:
    return lambda: scattered_softmax(data).gather(1, data.targets[:, None]).log()[:, 0]


def matching(data: Data) -> Tensor:
    log_weights = torch.log_softmax(-data.distances / data.temperature, 1)
    other = data.tokens != data.targets[:, None]
    return log_weights.masked_fill(other, -float("inf")).logsumexp(1)


def matching_eager(data: Data) -> Callable[[], Tensor]:
    return lambda: matching(data)


def matching_compiled(data: Data) -> Callable[[], Tensor]:
    run = torch.compile(matching)
    return lambda: run(data)


IMPLEMENTATIONS = {
    "knnext": fused,
    "torch_whole_row": whole_row,
    "torch_masked": matching_eager,
    "compiled_masked": matching_compiled,
}


def test_knn_target_log_prob(shape, device: str, implementation: str, measure) -> None:
    data = make_data(shape, device)
    run = IMPLEMENTATIONS[implementation](data)
    torch.testing.assert_close(run(), fused(data)(), rtol=1e-4, atol=1e-4)
    group = f"knn_target_log_prob {shape} {device}"
    traffic = data.distances.nbytes + data.tokens.nbytes
    measure(run, group=group, device=device, bytes_moved=traffic, shape=str(shape))
