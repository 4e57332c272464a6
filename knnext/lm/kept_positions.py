"""Which positions of a pass have logits: what ``logits_to_keep`` means to the models that know it.

They give it to a tensor's index as it comes (a number n: the last n), so whatever is to stand
beside their logits goes through the same index. Counts of positions could not tell: as many may be
kept as there are, in another order.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

#: What takes the kept positions out of a tensor whose second axis has them all.
Kept = slice | Tensor
ALL = slice(None)


def keeps_some(model: nn.Module) -> bool:
    """Whether the model knows ``logits_to_keep``; others may take the word and not heed it."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def kept_positions(model: nn.Module, arguments: dict[str, Any]) -> Kept:
    """The index of the positions that have logits, in a call of these arguments by name.

    ValueError for what is neither a number nor positions (n,).
    """
    keep = arguments.get("logits_to_keep")
    if keep is None or not keeps_some(model):
        return ALL
    if isinstance(keep, int):
        return slice(-keep, None)
    if isinstance(keep, slice):
        return keep
    places = keep
    if not isinstance(places, Tensor):
        places = torch.as_tensor(list(keep) if isinstance(keep, range) else keep, device="cpu")
    if places.ndim != 1:
        raise ValueError(
            f"logits_to_keep must be an int or positions (n,), got {type(keep).__name__} of shape "
            f"{tuple(places.shape)}"
        )
    return places


def taken(tensor: Tensor, kept: Kept) -> Tensor:
    """(B, n, ...) of (B, L, ...)."""
    return tensor[:, kept.to(tensor.device) if isinstance(kept, Tensor) else kept]


def num_positions(arguments: dict[str, Any]) -> int | None:
    """L of a call's tokens or embeddings, where it has them by their usual names."""
    for name in ("input_ids", "inputs_embeds"):
        given = arguments.get(name)
        if isinstance(given, Tensor) and given.ndim >= 2:
            return given.shape[1]
    return None
