"""What a KNNLM is made of, checked: its numbers, its key layer, and whether the datastore fits."""

from __future__ import annotations

import operator
import threading
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from knnext.lm.kept_positions import keeps_some
from knnext.lm.key_layer import KeyModule, find_key_module
from knnext.lm.mixing import Call, lending
from knnext.lm.running import evaluating, trace_inputs, trace_length

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


def check_index(index: Any) -> None:
    """TypeError for what cannot be searched, such as a datastore or its folder."""
    if not all(callable(getattr(index, name, None)) for name in ("search", "tokens")):
        raise TypeError(
            "index must have search(queries, k) and tokens(indices), as "
            f"ExactIndex(Datastore.open(FOLDER)) has, got {type(index).__name__}"
        )


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
    """The width of the model's logits, if the datastore fits the model.

    ValueError where it does not, or where the model has no logits of each position's next token.
    """
    if getattr(datastore, "has_values", True) is False:
        raise ValueError(
            "the index has no values, which are its rows' tokens: make it by "
            "from_tensors(keys, values)"
        )
    states, logits = _trial(model, key)
    if logits.ndim != 3 or logits.shape[1] != trace_length(model):
        raise ValueError(
            f"{type(model).__name__} gives logits of shape {tuple(logits.shape)} for "
            f"{trace_length(model)} tokens, where a causal language model gives one row for each"
        )
    width, vocab_size = states.shape[-1], logits.shape[-1]
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


def reads_all_positions(model: nn.Module, key: KeyModule) -> bool:
    """Whether the key module reads all positions, also where ``logits_to_keep`` leaves fewer."""
    if not keeps_some(model):
        return True
    states, _ = _trial(model, key, logits_to_keep=1)
    return states.numel() > states.shape[-1]


def _trial(model: nn.Module, key: KeyModule, **options: Any) -> tuple[Tensor, Tensor]:
    """States and logits of a pass of a few tokens."""
    found: list[Tensor] = []

    def look(call: Call, output: Any) -> Any:
        found.append(states_of(call, key))
        return output

    with evaluating(model), lending(model, key, look):
        logits: Tensor = model(**trace_inputs(model), **options).logits
    return found[0], logits


def states_of(call: Call, key: KeyModule) -> Tensor:
    if call.states is None:
        raise RuntimeError(f"{key} did not run in this forward pass")
    return call.states
