"""p_knn over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks, _gradients, _mixing
from knnext.ops._no_gradient import refuse_second_derivative


def knn_softmax(
    distances: Tensor, tokens: Tensor, temperature: float | Tensor, vocab_size: int
) -> Tensor:
    """Mask-to-k tempered softmax over neighbors, summed by token, scattered into the vocabulary.

    ``p[q, v] = sum over i with tokens[q, i] = v of softmax_i(-distances[q, i] / temperature)``:
    the kNN term of Khandelwal et al. (2020) with the temperature of Xu et al. (2023).
    A row sums to 1; a row without a neighbor is all zero.

    Args:
        distances: (Q, k) float32 (float64 too on the CPU), smaller is nearer.
        tokens: (Q, k) int64 or int32 vocabulary ids below ``vocab_size``; -1 weighs nothing.
        temperature: above 0; a number, or a tensor () or (Q,) where a gradient or one value a row
            is wanted.
        vocab_size: V.

    Returns:
        (Q, V) of the dtype of ``distances``. Differentiable in distances and tensor temperature.

    Raises:
        RuntimeError: on a bad argument, naming it, what was given and what is wanted. Values inside
            tensors are read where that costs no wait: on the CPU a token outside [-1, V) or
            a tensor temperature that is not above 0 raises too; on
            CUDA such a token stops the kernel with a device-side assertion, as torch's own
            indexing does, and such a temperature gives a row of NaN.
    """
    if isinstance(temperature, Tensor):
        return torch.ops.knnext.knn_softmax.tensor(distances, tokens, temperature, vocab_size)
    return torch.ops.knnext.knn_softmax.default(distances, tokens, temperature, vocab_size)


def _fake(
    distances: Tensor, tokens: Tensor, temperature: float | Tensor, vocab_size: int
) -> Tensor:
    _checks.knn_softmax(distances, tokens, temperature, vocab_size)
    return distances.new_empty(distances.shape[0], vocab_size)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    distances, tokens, temperature, _ = inputs
    is_tensor = isinstance(temperature, Tensor)
    ctx.temperature = None if is_tensor else temperature
    ctx.save_for_backward(distances, tokens, *([temperature] if is_tensor else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    distances, tokens, *rest = ctx.saved_tensors
    temperature = rest[0] if rest else ctx.temperature
    to_distances, per_row = _run_gradients(grad, distances, tokens, temperature)
    return to_distances, None, _mixing.sum_to_parameter(per_row, temperature), None


def _run_gradients(
    grad: Tensor, distances: Tensor, tokens: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():  # plain PyTorch has a second derivative
        return _gradients.knn_softmax(grad, distances, tokens, temperature)
    op = torch.ops.knnext._knn_softmax_gradients
    overload = op.tensor if isinstance(temperature, Tensor) else op.default
    return overload(grad, distances, tokens, temperature)


def _fake_gradients(
    grad: Tensor, distances: Tensor, tokens: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    return _mixing.fake_neighbor_gradients(distances)


for _name in ("", ".tensor"):
    torch.library.register_fake(f"knnext::knn_softmax{_name}", _fake)
    torch.library.register_autograd(
        f"knnext::knn_softmax{_name}", _backward, setup_context=_setup_context
    )
    torch.library.register_fake(f"knnext::_knn_softmax_gradients{_name}", _fake_gradients)
    refuse_second_derivative(f"_knn_softmax_gradients{_name}")
