"""Numbers as people have them, NumPy's and torch's among them, as the ops take them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from knnext.ops._checks import fail


def integer(op: str, name: str, value: Any) -> Any:
    """An int from whatever is an integer; refused are bools and what has a fraction, also of 0."""
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return value
    try:
        if not _is_bool(value):
            return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    return fail(op, f"{name} must be an integer, got {_shown(value)}")


def parameter(op: str, name: str, value: Any, like: Tensor) -> Any:
    """A float or, as it came, a tensor; one number on another device comes to that of ``like``."""
    if isinstance(value, Tensor):
        elsewhere = value.dim() == 0 and value.device != like.device and not value.is_meta
        return value.to(like.device) if elsewhere else value
    if isinstance(value, torch.SymFloat | torch.SymInt):
        return value
    if not _is_bool(value) and hasattr(value, "__float__"):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    return fail(op, f"{name} must be a number or a floating-point tensor, got {_shown(value)}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _shown(value: Any) -> str:
    text = repr(value)
    kind = type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}... of type {kind}"
