"""What a model that was read lacks: weights, numbers, memory, a row for each token."""

from __future__ import annotations

import math
import warnings
from typing import Any

from knnext.errors import KnnextWarning, ModelError
from knnext.lm.running import num_known_tokens
from knnext.lm.tensors import leaves


def check_weights(info: Any, source: str) -> None:
    """ModelError that names the tensors that would be left at random numbers."""
    found = info if isinstance(info, dict) else info.to_dict()
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    wrong = sorted(found["mismatched_keys"], key=lambda item: str(item[0]))
    if missing:
        text = f"{source} lacks weights of its model: {_some(missing)}"
        if unexpected:
            text += f"; it has others that the model does not know: {_some(unexpected)}"
        raise ModelError(f"{text}. They would be random numbers")
    if wrong:
        shown = [f"{name} is {tuple(given)}, not {tuple(wanted)}" for name, given, wanted in wrong]
        raise ModelError(f"{source} has weights of other shapes than its config: {_some(shown)}")
    if found.get("error_msgs"):
        lines = [str(message).strip().splitlines()[0] for message in found["error_msgs"]]
        raise ModelError(f"the weights of {source} cannot be loaded: {_some(lines)}")
    if unexpected:
        warnings.warn(
            f"{source} has {len(unexpected):,} weights that its model, as its config describes it, "
            f"does not use: {_some(unexpected)}",
            KnnextWarning,
            stacklevel=3,
        )


def check_finite(model: Any, source: str) -> None:
    """ModelError that names parameters with inf or nan: every state would be nan."""
    broken = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    if broken:
        raise ModelError(f"{source} has weights that are inf or nan: {_some(broken)}")


def _is_finite(parameter: Any) -> bool:
    return all(_leaf_is_finite(leaf) for _, leaf in leaves(parameter.detach()))


def _leaf_is_finite(tensor: Any) -> bool:
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    try:
        low, high = tensor.aminmax()  # nan comes through
    except (RuntimeError, NotImplementedError):  # an 8-bit type that torch only stores
        return True
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:4])
    return shown if len(items) <= 4 else f"{shown} and {len(items) - 4} more"


def warn_of_offloading(model: Any, source: str) -> None:
    """Of weights that fit no GPU: each pass fetches them from the CPU's memory, or a disk."""
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        warnings.warn(
            f"{source} does not fit the memory here: {len(away):,} of its weights, such as "
            f"{away[0]}, are fetched from the CPU's memory or a disk at each pass, which is slow. "
            "Try a smaller model_dtype, a quantization, or more or larger GPUs",
            KnnextWarning,
            stacklevel=3,
        )


def check_tokenizer(tokenizer: Any, model: Any, given: Any, source: str) -> None:
    rows = num_known_tokens(model)
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer {given} has {len(tokenizer):,} tokens; {source} knows {rows:,}"
        )
