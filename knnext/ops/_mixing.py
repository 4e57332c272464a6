"""What the gradients of the three mixing ops share: all go through z = -distances / temperature."""

from __future__ import annotations

import torch
from torch import Tensor

from knnext import reference

INF = float("inf")

column = reference._column


def log_weights(distances: Tensor, tokens: Tensor, temperature: float | Tensor) -> Tensor:
    """(Q, k) log a, the softmax over the neighbors kept; -inf at padding."""
    return reference._log_weights(distances, tokens, temperature)


def neighbor_gradients(
    grad_z: Tensor,
    distances: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    need_temperature: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of distances and, if asked for, of the temperature, from that of z.

    z = -d / t, so dz/dd = -1 / t and dz/dt = d / t^2.
    """
    t = column(temperature, grad_z)
    grad_distances = -grad_z / t
    if not need_temperature or not isinstance(temperature, Tensor):
        return grad_distances, None
    # A dead neighbor has grad_z 0, and 0 * inf must not become NaN. A row of grad_z sums to 0, so
    # any origin does for the distances; from the nearest, they are small and so is the rounding.
    absent = (tokens < 0) | (distances == INF)
    origin = distances.masked_fill(absent, INF).amin(1, keepdim=True) if distances.shape[1] else 0.0
    per_row = (-grad_distances * (distances - origin).masked_fill(absent, 0.0) / t).sum(1)
    return grad_distances, sum_to_parameter(per_row, temperature)


def sum_to_parameter(per_row: Tensor, parameter: Tensor) -> Tensor:
    """(Q,) gradient of a row parameter, in the shape and dtype that the caller passed."""
    grad = per_row.sum() if parameter.dim() == 0 else per_row
    return grad.to(parameter.dtype)


def both_tensors(first: float | Tensor, second: float | Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The `.tensor` overloads take two tensors: a plain number beside a tensor becomes one."""

    def as_tensor(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value
        return torch.full((), value, dtype=like.dtype, device=like.device)

    return as_tensor(first), as_tensor(second)
