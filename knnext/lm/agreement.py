"""What a KNNLM is made of, checked: its numbers, its key layer, and whether the datastore fits."""

from __future__ import annotations

import operator
import threading
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from knnext.lm.key_layer import KeyModule, find_key_module
from knnext.lm.mixing import Call, lending
from knnext.lm.running import evaluating, trace_inputs

_FINDING = threading.RLock()
_FOUND: WeakKeyDictionary[nn.Module, dict[str, KeyModule]] = WeakKeyDictionary()


def key_module(model: nn.Module, key_layer: str) -> KeyModule:
    """``find_key_module``, which watches the model, once for each model and by one thread."""
    with _FINDING:
        kept = _FOUND.setdefault(model, {})
        key = kept.get(key_layer)
        # Adapters, for one, put other modules into the places of old ones.
        if key is None or dict(model.named_modules()).get(key.name) is not key.module:
            key = kept[key_layer] = find_key_module(model, key_layer)
    return key


def checked_k(k: Any) -> int:
    try:
        number = operator.index(k)  # NumPy's integers are integers
    except TypeError:
        number = 0
    if isinstance(k, bool) or number < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    return number


def checked_numbers(
    temperature: float | Tensor, lmbda: float | Tensor
) -> tuple[float | Tensor, float | Tensor]:
    # Tensors may be learned, so their values are the op's concern, at the time of use.
    temperature, lmbda = _number("temperature", temperature), _number("lmbda", lmbda)
    if not isinstance(temperature, Tensor) and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature!r}")
    if not isinstance(lmbda, Tensor) and not 0 <= lmbda <= 1:
        raise ValueError(f"lmbda must be from 0 to 1, got {lmbda!r}")
    return temperature, lmbda


def _number(name: str, value: Any) -> float | Tensor:
    if isinstance(value, Tensor):
        return value
    kind = str(getattr(value, "dtype", type(value).__name__))
    if hasattr(value, "__float__") and kind != "bool":
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise TypeError(f"{name} must be a number or a tensor, got {value!r}")


def agreed_layer(wanted: str | None, stored: str | None) -> str:
    if wanted is not None and stored is not None and wanted != stored:
        raise ValueError(f"key_layer={wanted!r}, but the datastore's keys are of {stored!r}")
    return wanted or stored or "att"


def check_datastore(model: nn.Module, key: KeyModule, datastore: Any) -> int:
    """The width of the model's logits, if the datastore fits the model."""
    if getattr(datastore, "has_values", True) is False:
        raise ValueError(
            "the index has no values, which are its rows' tokens: make it by "
            "from_tensors(keys, values)"
        )
    widths: list[int] = []

    def look(call: Call, output: Any) -> Any:
        widths.append(states_of(call, key).shape[-1])
        return output

    with evaluating(model), lending(model, key, look):
        vocab_size: int = model(**trace_inputs(model)).logits.shape[-1]
    width = widths[0]
    dim = getattr(datastore, "dim", None)
    if dim is not None and dim != width:
        raise ValueError(f"the datastore's keys have dim={dim}, but {key} of this model {width}")
    stored = getattr(datastore, "vocab_size", None)
    if stored is not None and stored > vocab_size:
        raise ValueError(
            f"the datastore's tokens are of a vocabulary of {stored}, but the model's logits have "
            f"{vocab_size}: it was built with another tokenizer"
        )
    return vocab_size


def states_of(call: Call, key: KeyModule) -> Tensor:
    if call.states is None:
        raise RuntimeError(f"{key} did not run in this forward pass")
    return call.states
