"""Neighbor indices to token ids."""

from __future__ import annotations

import torch
from torch import Tensor

from knnext import reference


def gather_tokens(values: Tensor, indices: Tensor) -> Tensor:
    """The token of each neighbor: ``values[indices]``, with -1 kept where the index is -1.

    Args:
        values: (N,) int64 or int32, the token that followed each key.
        indices: (Q, k) int64, as :func:`knn_search` returns them; -1 is padding.

    Returns:
        (Q, k) of the dtype of ``values``. Plain ``values[indices]`` would read the last row at -1.
    """
    if values.dim() != 1 or values.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"values must be an int32 or int64 tensor of shape (N,), got {values.dtype} of shape "
            f"{tuple(values.shape)}"
        )
    if indices.dtype != torch.int64:
        raise ValueError(f"indices must be int64, got {indices.dtype}")
    if values.device != indices.device:
        raise ValueError(
            f"values must be on the device of indices, {indices.device}, got {values.device}"
        )
    return reference.gather_tokens(values, indices)
