"""Which positions of a tensor a later tensor depends on, read off a derivative.

Whether a module mixes positions is a fact of its structure, and a derivative shows it without a
threshold: where an output does not depend on another position, the derivative is exactly 0, in
every dtype and for weights of any size. A change of the output could drown in the rounding of a
residual. Parameters that are all 0 (a projection that training begins at 0) would hide a
dependence; they are drawn at random for the length of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from knnext.lm.running import first_tensor, float_tensors, here

#: Keeps small derivatives above the least float16; their size says nothing else.
_COTANGENT = 64.0


@dataclass(frozen=True)
class Place:
    """The input or output of the n-th call of a module in one forward pass."""

    module: nn.Module
    side: Literal["input", "output"]
    nth: int = 0


def positions_first(tensor: Tensor | None, length: int) -> Tensor | None:
    """The tensor with its axis of ``length`` positions in front; None where it has none."""
    if tensor is None:
        return None
    axes = [axis for axis in range(tensor.ndim - 1) if tensor.shape[axis] == length]
    if not axes:
        return None
    return tensor.movedim(axes[-1], 0)


def dependence(
    run: Callable[[nn.Module], Any],
    model: nn.Module,
    cut: Place,
    seen: Place,
    rows: slice,
    length: int,
    waking: nn.Module | None = None,
) -> Tensor | None:
    """(length,) largest |derivative| of the ``rows`` of ``seen`` by each position of ``cut``.

    All float tensors that a module is given count as its input: an attention may read its queries
    and its keys apart. ``run(model)`` does a forward pass. ``waking`` is a part of the model whose
    all-zero parameters are drawn at random. None where no derivative comes through (kernels
    without a backward pass, a place that is not met, tensors without an axis of positions).
    """
    leaves: list[Tensor] = []
    outputs: list[Tensor] = []

    def open_cut(tensor: Tensor) -> Tensor | None:
        if positions_first(tensor, length) is None:
            return None
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()  # which may be written to

    def keep(tensor: Tensor) -> None:
        outputs.append(tensor)

    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _drawn_zeros(model, waking),
            at_place(cut, open_cut),
            at_place(seen, keep),
        ):
            run(model)
            output = positions_first(outputs[0], length) if outputs else None
            if output is None or not output.requires_grad or not leaves:
                return None
            chosen = output[rows]
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(
                chosen.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            cotangent = (_COTANGENT * weights).to(chosen.device, chosen.dtype)
            slopes = torch.autograd.grad(chosen, leaves, cotangent, allow_unused=True)
    except Exception:  # models and kernels without a backward pass raise what they like
        return None
    given = [by for by in (positions_first(slope, length) for slope in slopes) if by is not None]
    if not given:
        return None
    sizes = torch.stack([by.detach().float().abs().flatten(1).amax(dim=1) for by in given])
    return sizes.amax(dim=0) if bool(sizes.isfinite().all()) else None


@contextmanager
def at_place(place: Place, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Calls ``change`` with each tensor of an input, or the one of an output, at a place.

    A tensor that it gives stands there instead.
    """
    calls = 0

    def now() -> bool:
        nonlocal calls
        calls += 1
        return calls - 1 == place.nth

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not now():
            return None
        whole = (args, kwargs)
        for old in float_tensors(whole):
            new = change(old)
            whole = whole if new is None else replaced(whole, old, new)
        return whole

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        old = output_tensor(output) if now() else None
        new = None if old is None else change(old)
        return None if new is None else replaced(output, old, new)

    if place.side == "input":
        handle = place.module.register_forward_pre_hook(here(before), with_kwargs=True)
    else:
        handle = place.module.register_forward_hook(here(after))
    try:
        yield
    finally:
        handle.remove()


def output_tensor(output: Any) -> Tensor | None:
    """Logits where there are any, else the first float tensor."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else first_tensor(output)


def replaced(value: Any, old: Tensor | None, new: Tensor) -> Any:
    """``value`` with ``new`` wherever ``old`` stood in tuples, lists and dicts."""
    if value is old:
        return new
    if isinstance(value, dict):
        return {key: replaced(item, old, new) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(replaced(item, old, new) for item in value)
    return value


@contextmanager
def _drawn_zeros(model: nn.Module, part: nn.Module | None) -> Iterator[None]:
    """Random values in the parameters of ``part`` that are all 0, given back at the end."""
    drawn: list[tuple[nn.Module, str, nn.Parameter]] = []
    generator = torch.Generator().manual_seed(1)
    for module in [] if part is None else part.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _is_zero(parameter):
                drawn.append((module, name, parameter))
    try:
        for module, name, parameter in drawn:
            values = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            values /= max(1, parameter.shape[-1]) ** 0.5
            module._parameters[name] = nn.Parameter(
                values.to(parameter.device, parameter.dtype), requires_grad=False
            )
        yield
    finally:
        for module, name, parameter in drawn:
            module._parameters[name] = parameter


def _is_zero(parameter: Tensor) -> bool:
    if not parameter.is_floating_point() or parameter.ndim == 0 or parameter.device.type == "meta":
        return False
    try:
        return not bool(parameter.detach().any())
    except (RuntimeError, NotImplementedError):  # an 8-bit type that torch only stores
        return False
