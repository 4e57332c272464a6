"""p_knn over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnext.ops import _checks, _gradients, _mixing, _numbers, _tangents
from knnext.ops._derivatives import call, register_derivatives, register_gradient


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
    if type(temperature) is not float:
        temperature = _numbers.parameter("knn_softmax", "temperature", temperature, distances)
    if type(vocab_size) is not int:
        vocab_size = _numbers.integer("knn_softmax", "vocab_size", vocab_size)
    # Not by the bool itself, which torch 2.10 does not compile.
    op = _OP[1 if isinstance(temperature, Tensor) else 0]
    return call(op, distances, tokens, temperature, vocab_size)


_OP = (torch.ops.knnext.knn_softmax.default, torch.ops.knnext.knn_softmax.tensor)
_GRADIENTS = (
    torch.ops.knnext._knn_softmax_gradients.default,
    torch.ops.knnext._knn_softmax_gradients.tensor,
)


def _fake(
    distances: Tensor, tokens: Tensor, temperature: float | Tensor, vocab_size: int
) -> Tensor:
    _checks.knn_softmax(distances, tokens, temperature, vocab_size)
    return distances.new_empty(distances.shape[0], vocab_size)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    distances, tokens, temperature, ctx.vocab_size = inputs
    _mixing.save(ctx, (distances, tokens), (temperature,))


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    distances, tokens, temperature = _mixing.saved(ctx)
    gradients = _GRADIENTS[isinstance(temperature, Tensor)]
    to_distances, per_row = call(gradients, grad, distances, tokens, temperature)
    return to_distances, None, _mixing.sum_to_parameter(per_row, temperature), None


def _jvp(ctx: Any, d_distances: Any, _: Any, d_temperature: Any, *__: Any) -> Tensor:
    distances, tokens, temperature = _mixing.saved_primals(ctx)
    changes = (d_distances, d_temperature)
    return _tangents.knn_softmax(distances, tokens, temperature, ctx.vocab_size, *changes)


def _fake_gradients(
    grad: Tensor, distances: Tensor, tokens: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    return _mixing.fake_neighbor_gradients(distances)


for _name in ("", ".tensor"):
    torch.library.register_fake(f"knnext::knn_softmax{_name}", _fake)
    register_derivatives(
        f"knn_softmax{_name}", setup_context=_setup_context, backward=_backward, jvp=_jvp
    )
    torch.library.register_fake(f"knnext::_knn_softmax_gradients{_name}", _fake_gradients)
    register_gradient(f"_knn_softmax_gradients{_name}", _gradients.knn_softmax)
