"""What the three mixing ops share on their way to the compiled op and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _derivatives


def save(ctx: Any, tensors: tuple[Tensor, ...], parameters: tuple[float | Tensor, ...]) -> None:
    """For the backward and the forward derivative; see :func:`saved`."""
    are_tensors = isinstance(parameters[0], Tensor)
    ctx.numbers = () if are_tensors else parameters
    kept = (*tensors, *parameters) if are_tensors else tensors
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept)
    ctx.save_for_forward(*kept)


def saved(ctx: Any) -> Any:
    """The tensors, then the parameters, as they came."""
    return (*ctx.saved_tensors, *ctx.numbers)


def saved_primals(ctx: Any) -> Any:
    """The same for a forward derivative."""
    return (*_derivatives.saved_primals(ctx), *ctx.numbers)


def sum_to_parameter(per_row: Tensor, parameter: float | Tensor) -> Tensor | None:
    """(Q,) gradient of a row parameter, in the shape and dtype that the caller passed."""
    if not isinstance(parameter, Tensor):
        return None
    grad = per_row.sum() if parameter.dim() == 0 else per_row
    return grad.to(parameter.dtype)


def both_tensors(first: float | Tensor, second: float | Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The `.tensor` overloads take two tensors: a plain number beside a tensor becomes one, of
    float64, so that it stays the number it is.
    """

    def as_tensor(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value
        return torch.full((), value, dtype=torch.float64, device=like.device)

    return as_tensor(first), as_tensor(second)


def fake_neighbor_gradients(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Those of distances (Q, k) and, by row, of the temperature."""
    return distances.new_empty(distances.shape), distances.new_empty(distances.shape[0])
