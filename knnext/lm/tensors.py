"""The tensors that a model is made of, wherever they are and however they are packed.

Quantized weights are tensors inside of tensors, or no parameters at all; offloaded ones lie in a
map that accelerate's hooks keep, while the model holds empty ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from knnext.lm.wrapped import plain_name

Load = Callable[[], Tensor]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Load]]:
    """Parameters and saved buffers, each once, in the order of their names; read when called for.

    ValueError where one is on the meta device and nothing tells what it would be.
    """
    seen: set[tuple[Any, ...]] = set()
    saved = {plain_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    away = _offloaded(model)
    for name in sorted(saved):
        if not isinstance(saved[name], Tensor):  # a quantized layer's, packed with its bias
            for number, inner in enumerate(_tensors_in(saved[name])):
                yield from _parts(f"{name}.{number}", inner)
            continue
        tensor = saved[name]
        if not tensor.is_meta:
            if (id(tensor),) not in seen:
                seen.add((id(tensor),))
                yield from _parts(name, tensor.detach())
        elif name in away:
            key = _same_storage(model, name, away, saved)
            if key not in seen:
                seen.add(key)
                yield name, away[name]
        else:
            raise ValueError(
                f"the weights of {type(model).__name__} are not in memory ({name} is on the "
                "meta device), so the model cannot be told from others"
            )


def leaves(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, plain tensor): the tensor itself, or those that a packed one is made of."""
    if tensor.is_quantized:
        yield "int_repr", tensor.int_repr()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield (
                "scale",
                torch.tensor(
                    [tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float32, device="cpu"
                ),
            )
        else:
            yield "scale", tensor.q_per_channel_scales()
            yield "zero_point", tensor.q_per_channel_zero_points()
        return
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield "", tensor
        return
    for name in flatten()[0]:
        for inner, leaf in leaves(getattr(tensor, name)):
            yield f"{name}.{inner}" if inner else name, leaf


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Load]]:
    for inner, leaf in leaves(tensor):
        yield (f"{name}.{inner}" if inner else name), _given(leaf)


def _given(tensor: Tensor) -> Load:
    return lambda: tensor


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)


def _offloaded(model: nn.Module) -> dict[str, Load]:
    """What accelerate's hooks know of weights that were moved to the CPU's memory or a disk."""
    found: dict[str, Load] = {}
    for prefix, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", None) or [hook]:
            kept = getattr(part, "weights_map", None)
            if kept is None:
                continue
            recurse = bool(getattr(part, "place_submodules", False))
            for name, tensor in (
                *module.named_parameters(recurse=recurse),
                *module.named_buffers(recurse=recurse),
            ):
                if tensor.is_meta:
                    full = plain_name(f"{prefix}.{name}" if prefix else name)
                    found[full] = _kept(kept, name)
    return found


def _kept(weights: Any, name: str) -> Load:
    return lambda: weights[name].detach()


def _same_storage(
    model: nn.Module, name: str, away: dict[str, Load], saved: dict[str, Any]
) -> tuple[Any, ...]:
    """The same for names of one tensor: offloading takes tied weights apart."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.get(name, name)
    return ("tied", source if source in away and source in saved else name)
