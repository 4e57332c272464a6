"""knn_interpolate against log_softmax + scattered softmax + log + logaddexp, and log_softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from mixing_data import SHAPES, Data, make_data, scattered_softmax
from torch import Tensor

import knnext

__all__ = ["SHAPES"]


def mixture(data: Data, p_knn: Tensor) -> Tensor:
    log_p_lm = torch.log_softmax(data.logits.float(), 1) + math.log1p(-data.lmbda)
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


def compiled(data: Data) -> Callable[[], Tensor]:
    """Two graphs: as one, torch 2.13's CPU compiler gives wrong values where neighbors are."""
    scatter, mix = torch.compile(scattered_softmax), torch.compile(mixture)
    return lambda: mix(data, scatter(data))


def bare_log_softmax(data: Data) -> Callable[[], Tensor]:
    """No op: the LM alone."""
    return lambda: torch.log_softmax(data.logits, 1, dtype=torch.float32)


IMPLEMENTATIONS = {
    "knnext": fused,
    "torch_eager": eager,
    "torch_probabilities": in_probabilities,
    "torch_compiled": compiled,
    "bare_log_softmax": bare_log_softmax,
}


def test_knn_interpolate(shape, device: str, implementation: str, measure) -> None:
    data = make_data(shape, device)
    run = IMPLEMENTATIONS[implementation](data)
    if implementation != "bare_log_softmax":
        torch.testing.assert_close(run(), fused(data)(), rtol=1e-4, atol=1e-4)
    group = f"knn_interpolate {shape} {device}"
    traffic = data.output_bytes + data.logits.nbytes
    measure(run, group=group, device=device, bytes_moved=traffic, shape=str(shape))
