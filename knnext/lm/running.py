"""What every run of a model needs: its mode, a few tokens to try it on, the tensor it gave."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

#: Tokens of a trial pass: a number that no count of heads or experts equals. Fewer where the model
#: reads no more.
TRACE_LENGTH = 7
_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; every module's own mode comes back after.

    ``no_grad`` and not ``inference_mode``: what comes out may meet autograd later (a learned
    temperature, a rescored search), which refuses inference tensors.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Nothing below an error is said by transformers inside the block, if it is loaded at all."""
    logging: Any = sys.modules.get("transformers.utils.logging")
    if logging is None:
        yield
        return
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


class Hook:
    """A hook of its module alone: in a copy of the module, deep or pickled, it does nothing."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # What takes any arguments and gives None, also where the copy is loaded without knnext.
        return getattr, (nullcontext(), "__exit__")


def here(hook: Callable[..., Any]) -> Hook:
    """The hook for the calls of this thread alone: others may be using the model meanwhile."""
    thread = threading.get_ident()

    def for_this_thread(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    return Hook(for_this_thread)


def context_length(model: nn.Module) -> int | None:
    """The longest text that the model's config allows, where it says so."""
    config: Any = getattr(model, "config", None)
    lengths = (getattr(config, name, None) for name in _LENGTH_NAMES)
    return next((n for n in lengths if isinstance(n, int) and n > 0), None)


def trace_length(model: nn.Module) -> int:
    return min(TRACE_LENGTH, context_length(model) or TRACE_LENGTH)


def trace_inputs(model: nn.Module) -> dict[str, Any]:
    """Arguments of a forward pass of a few tokens, on the model's device and without a cache."""
    ids = torch.arange(1, trace_length(model) + 1, device=input_device(model)) % num_known_tokens(
        model
    )
    inputs: dict[str, Any] = {"input_ids": ids[None]}
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters):
        inputs["use_cache"] = False
    return inputs


def input_device(model: nn.Module) -> torch.device:
    """Where a model's tokens go: of one that is spread over devices, where its embedding runs.

    That of weights that were moved out of the way (accelerate's offloading) is kept by their hook.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    for module in (embedding, *embedding.modules(), model):
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", None) or [hook]:
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    tensors = (*embedding.parameters(), *embedding.buffers(), *model.parameters())
    found = next((t.device for t in tensors if t.device.type != "meta"), None)
    if found is None:
        raise ValueError(
            f"the weights of {type(model).__name__} are on the meta device: it is empty"
        )
    return found


def num_known_tokens(model: nn.Module) -> int:
    """How many tokens the model's embedding has a row for."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():  # packed, or a method
        size = getattr(embedding, "num_embeddings", None)
        if isinstance(size, int):
            return size
        weight = next(embedding.parameters())
    return int(weight.shape[0])


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in nested arguments, in order, positional before named."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        named = value.get("hidden_states")
        values = [named, *value.values()] if named is not None else list(value.values())
    elif isinstance(value, (tuple, list)):
        values = list(value)
    else:
        return None
    return next((t for t in map(first_tensor, values) if t is not None), None)


def float_tensors(value: Any) -> list[Tensor]:
    """Every floating-point tensor in nested arguments, each object once."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return []
    found = {id(tensor): tensor for item in value for tensor in float_tensors(item)}
    return list(found.values())
