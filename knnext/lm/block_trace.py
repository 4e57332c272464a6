"""What runs in a model's last block: one short forward pass, written down as a tree of calls.

The blocks are the elements of module lists that lie in no other list. The last block is the one
that finishes last, of the lists in which some element mixes positions: a list of output layers, or
of the halves of blocks, holds none. Neither names nor sizes decide, so a model with two stacks, or
with a tower for images that text does not pass, gives the block that its text leaves last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from knnext.errors import ModelError
from knnext.lm.positions import Place, dependence, output_tensor, positions_first, replaced
from knnext.lm.quantized import is_quantized
from knnext.lm.running import first_tensor, here, trace_inputs, trace_length

#: Without derivatives: above this share of the change elsewhere, a change is no rounding.
_MIXING_SHARE = 0.02
#: Where eight bits of a row are cut by the range of all rows, rounding is more than that.
_MIXING_SHARE_QUANTIZED = 0.1


@dataclass(eq=False)
class Call:
    """One call of a module in the traced pass, with the calls it made itself."""

    name: str
    module: nn.Module
    nth: int
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    calls: list[Call] = field(default_factory=list)

    @property
    def read(self) -> Tensor | None:
        return first_tensor((self.args, self.kwargs))

    @property
    def given(self) -> Tensor | None:
        return output_tensor(self.output)

    @property
    def matrix_calls(self) -> list[Call]:
        if isinstance(getattr(self.module, "base_layer", None), nn.Module):
            return []  # an adapter around a layer: one layer, as it is without
        return [c for c in self.calls if num_matrices(c.module)]

    @property
    def is_leaf(self) -> bool:
        return not self.matrix_calls

    def walk(self) -> Iterator[Call]:
        """This call and all under it, in the order in which they began."""
        yield self
        for call in self.calls:
            yield from call.walk()

    def reads_width(self, widths: set[int]) -> bool:
        return self.read is not None and self.read.shape[-1] in widths

    def keeps_width(self, widths: set[int]) -> bool:
        read, given = self.read, self.given
        return (
            read is not None
            and given is not None
            and self.reads_width(widths)
            and given.shape[-1] == read.shape[-1]
        )


class BlockTrace:
    """The calls of one forward pass of a few tokens, and which of them mix positions."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.length = trace_length(model)
        self.root = _traced(model)
        self._alone: dict[tuple[int, int], bool] = {}
        self.block = self._last_block()
        #: What a block may read: several residual streams side by side are wider than its layers.
        self.widths = {c.read.shape[-1] for c in (self.block, *self._head()) if c.read is not None}

    def alone(self, inner: Call, outer: Call) -> bool:
        """Whether what ``inner`` reads at one position reaches ``outer``'s output there and only
        there. False also where it cannot be told."""
        known = (id(inner), id(outer))
        if known not in self._alone:
            self._alone[known] = self._asked(inner, outer)
        return self._alone[known]

    def _asked(self, inner: Call, outer: Call) -> bool:
        length = _length(inner.read, self.length)
        if length < 2:
            return False
        slopes = dependence(
            lambda model: model(**trace_inputs(self.model)),
            self.model,
            Place(inner.module, "input", inner.nth),
            Place(outer.module, "output", outer.nth),
            slice(-1, None),
            length,
            waking=outer.module,
        )
        if slopes is not None and bool(slopes[-1] > 0):
            return not bool(slopes[:-1].any())
        share = _MIXING_SHARE_QUANTIZED if is_quantized(self.model) else _MIXING_SHARE
        return _unmoved(inner, length, share) if inner is outer else True

    def peers(self) -> list[nn.Module]:
        """The last block and those that stand in one list with it, in their order there."""
        lists = _outer_lists(self.model)
        owner = lists[id(self.block.module)]
        return [m for m in self.model.modules() if lists.get(id(m)) == owner]

    def _head(self) -> list[Call]:
        getter = getattr(self.model, "get_output_embeddings", None)
        head = getter() if getter is not None else None
        return [call for call in self.root.walk() if call.module is head]

    def _mixes(self, block: Call) -> bool:
        """Whether it or a part of it mixes: of two residual streams one may pass by attention."""
        return any(not self.alone(call, call) for call in block.walk() if not call.is_leaf)

    def _last_block(self) -> Call:
        lists = _outer_lists(self.model)
        blocks = [c for c in self.root.walk() if id(c.module) in lists and not c.is_leaf]
        # Elements of one list run one after the other, so that the last to begin is the last.
        seen: set[int] = set()
        for block in reversed(blocks):
            owner = lists[id(block.module)]
            if owner in seen:
                continue
            seen.add(owner)
            peers = [c for c in reversed(blocks) if lists[id(c.module)] == owner]
            if any(self._mixes(peer) for peer in peers):
                return block
        raise ModelError(
            f"{type(self.model).__name__} has no list of blocks that ran in a forward pass of "
            f"{self.length} tokens; {how_to_name()}"
        )


def num_matrices(module: nn.Module) -> int:
    return len(_matrices(module))


def _matrices(module: nn.Module) -> set[int]:
    """Of a layer that an adapter is wrapped around (PEFT): the layer's own.

    A linear layer has one, also where it is packed into what is no parameter (quantized).
    """
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        return _matrices(base)
    found = {id(p) for p in module.parameters(recurse=False) if p.ndim >= 2}
    found = found.union(*map(_matrices, module.children()))
    return found or (
        {id(module)} if isinstance(getattr(module, "out_features", None), int) else found
    )


def how_to_name() -> str:
    return "name the module by hand: key_layer='module:NAME:input' or 'module:NAME:output'"


def _traced(model: nn.Module) -> Call:
    root = Call("", model, 0)
    stack, counts = [root], Counter[int]()
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append(Call(names[id(module)], module, counts[id(module)], args, kwargs))
        counts[id(module)] += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = stack.pop()
        call.output = output
        stack[-1].calls.append(call)

    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(here(enter), with_kwargs=True))
            handles.append(module.register_forward_hook(here(leave)))
        model(**trace_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return root.calls[0]


def _outer_lists(model: nn.Module) -> dict[int, int]:
    """id of each element of an outermost list of modules -> id of that list."""
    found: dict[int, int] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if name and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            inside.append(f"{name}.")
            found.update({id(element): id(module) for element in module})
    return found


def _length(read: Tensor | None, length: int) -> int:
    """The number of positions of what a call reads; 0 where it has no such axis."""
    if read is None or read.ndim < 2:
        return 0
    if positions_first(read, length) is not None:
        return length
    return read.shape[-2] if read.ndim == 3 else 0


def _unmoved(call: Call, length: int, share: float) -> bool:
    """Whether changing the earlier positions leaves the last one's output nearly as it was.

    Only for kernels without derivatives, where a small mixing cannot be told from rounding.
    """
    read = call.read
    assert read is not None
    changed = 2 * read.flip(-1) + 1
    last, was_last = positions_first(changed, length), positions_first(read, length)
    if last is None or was_last is None:
        return False
    last[-1] = was_last[-1]
    args, kwargs = replaced((call.args, call.kwargs), read, changed)
    try:
        with torch.no_grad():
            was = output_tensor(call.module(*call.args, **call.kwargs))
            now = output_tensor(call.module(*args, **kwargs))
    except Exception:  # a module that cannot be run by itself cannot be tested
        return False
    if was is None or now is None or was.shape != now.shape:
        return False
    change = positions_first((now.float() - was.float()).abs(), length)
    if change is None:
        return False
    return bool(change[-1].max() <= share * change[:-1].max())
