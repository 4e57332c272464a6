"""What a KNNLM does not offer of its base model, and what to do instead.

A method of the base model that calls the model would give the base's answers for the mixture's, in
silence. So a KNNLM has only what it names, and says of the rest why.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from torch import nn

from knnext.lm.wrapped import plain_model

_BATCHING = (
    "continuous batching runs the model in a thread of its own and keeps states in pages, where no "
    "neighbors are searched: call generate with a batch of prompts, padded on the left"
)
_SAVING = (
    "a KNNLM is not saved as one: save the base model (lm.model.save_pretrained); the datastore is "
    "a folder already"
)
_RESIZING = "resize the base model before the datastore is built: its tokens are of one vocabulary"
_DRAFTING = "a KNNLM drafts for no other model: give its base model as assistant_model"
_REASONS = {
    **dict.fromkeys(("save_pretrained", "push_to_hub", "from_pretrained"), _SAVING),
    **dict.fromkeys(
        ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"),
        _BATCHING,
    ),
    "_supports_logits_to_keep": _DRAFTING,
    **dict.fromkeys(("resize_token_embeddings", "set_input_embeddings"), _RESIZING),
}
_OTHER = (
    "the base model's would know of no neighbors: call it on lm.model if that is meant, or inside "
    "`with lm.attached() as model:`, where the base model gives the mixture"
)


#: What is no method and tells how the base model is held: by it a Trainer, a pipeline or accelerate
#: know that a model is not to be moved. Offered where the base model has it.
FACTS = frozenset(
    (
        *("hf_device_map", "hf_quantizer", "quantization_method", "is_quantized"),
        *("is_loaded_in_4bit", "is_loaded_in_8bit", "main_input_name"),
    )
)


def why_not(name: str, base: Any) -> str:
    """The message of an AttributeError: what only the base model has, and what to do instead."""
    text = f"'KNNLM' object has no attribute {name!r}"
    if name in _REASONS:
        return f"{text}: {_REASONS[name]}"
    return f"{text}: {_OTHER}" if base is not None and hasattr(type(base), name) else text


_LOCK = threading.Lock()
_USERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_ENTRANCE = "init_continuous_batching"


class _Refusal:
    """Stands in the place of a model's method. In a copy of the model it is the method again."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"a KNNLM is attached to this model: {_BATCHING}")

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model(), _ENTRANCE)


@contextmanager
def no_continuous_batching(model: nn.Module) -> Iterator[None]:
    """Inside the block the model refuses what would pass a KNNLM by, in whatever thread."""
    model = plain_model(model)
    if not hasattr(type(model), _ENTRANCE):
        yield
        return
    with _LOCK:
        _USERS[model] = _USERS.get(model, 0) + 1
        model.__dict__.setdefault(_ENTRANCE, _Refusal(model))
    try:
        yield
    finally:
        with _LOCK:
            _USERS[model] -= 1
            if _USERS[model] == 0:
                del _USERS[model]
                model.__dict__.pop(_ENTRANCE, None)
