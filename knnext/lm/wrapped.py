"""The model inside its wrappers: a compiled one's, an adapter's. There its hooks and names live.

A wrapper's own forward may be passed by (``generate`` calls the model inside), so what is hooked,
run and told by its weights is always the model itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: What torch.compile puts into the name of a module that it wraps.
COMPILED_NAME = "_orig_mod"


def plain_model(model: nn.Module) -> nn.Module:
    """The model of transformers inside torch.compile's and peft's wrappers, if there are any.

    The adapter stays in its layers. ValueError for one of virtual tokens, TypeError for no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "model must be a loaded model of transformers, as load_lm or from_pretrained give it, "
            f"got {type(model).__name__} {model!r:.80}"
        )
    found: Any = model
    while True:
        if isinstance(inner := getattr(found, COMPILED_NAME, None), nn.Module):
            found = inner
        elif isinstance(getattr(found, "peft_config", None), dict) and hasattr(
            found, "get_base_model"
        ):
            check_no_virtual_tokens(found)
            found = found.get_base_model()
        else:
            return found


def check_no_virtual_tokens(model: Any) -> None:
    for config in model.peft_config.values():
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(virtual_tokens(f"the adapter on {type(model).__name__}", kind))


def virtual_tokens(adapter: str, kind: Any) -> str:
    return (
        f"{adapter} is of type {kind}, which puts virtual tokens before a text: states that no "
        "token of it made. knnext takes adapters that change weights, such as LORA, IA3 or VERA"
    )


def plain_name(name: str) -> str:
    """A module's or tensor's name as it is without torch.compile's wrapper."""
    return ".".join(part for part in name.split(".") if part != COMPILED_NAME)
