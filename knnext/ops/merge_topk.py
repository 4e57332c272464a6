"""The best k of several searches."""

from __future__ import annotations

import torch
from torch import Tensor

from knnext.ops import _checks, _numbers
from knnext.ops._derivatives import call, register_no_derivative


def merge_topk(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of m candidates a row, in order of (distance, index).

    Concatenate the results of several searches along dim 1 and merge them here.

    Args:
        distances: (Q, m) float32, smaller is nearer.
        indices: (Q, m) int64; -1 is padding and loses to everything. A NaN distance counts as
            padding too.
        k: how many to keep; beyond m the tail is padding.

    Returns:
        distances (Q, k) float32 and indices (Q, k) int64, padded with +inf and -1. No gradient.
    """
    if type(k) is not int:
        k = _numbers.integer("merge_topk", "k", k)
    return call(_OP, distances, indices, k)


_OP = torch.ops.knnext.merge_topk.default


@torch.library.register_fake("knnext::merge_topk")
def _fake(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _checks.merge_topk(distances, indices, k)
    shape = (distances.shape[0], k)
    return distances.new_empty(shape), indices.new_empty(shape)


register_no_derivative("merge_topk")
