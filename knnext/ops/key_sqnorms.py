"""Squared norms of the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from knnext.ops import _checks
from knnext.ops._derivatives import call, register_no_derivative


def key_sqnorms(keys: Tensor) -> Tensor:
    """Sum of squares of each key, in float32: computed once, passed to every :func:`knn_search`.

    Args:
        keys: (N, D) float16, bfloat16 or float32.

    Returns:
        (N,) float32. No gradient.
    """
    return call(_OP, keys)


_OP = torch.ops.knnext.key_sqnorms.default


@torch.library.register_fake("knnext::key_sqnorms")
def _fake(keys: Tensor) -> Tensor:
    _checks.key_sqnorms(keys)
    return keys.new_empty(keys.shape[0], dtype=torch.float32)


register_no_derivative("key_sqnorms")
