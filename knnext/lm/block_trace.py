"""Finds the feed-forward of a model's last block by watching one short forward pass.

The rules, none of which knows a model's name:

1. The blocks are the module list that holds the most parameters; the last block is the element
   of it that runs last.
2. The block's own calls are recorded in order. Those of modules that hold a matrix are kept, which
   leaves attention and feed-forward and drops norms, dropouts and activations.
3. A feed-forward works on each position alone. This is tested: the module is run again with all
   positions but the last changed, and the last position's output must stay.
4. The feed-forward is the last such module that reads and gives the block's width. Where the block
   holds its layers bare (fc1, activation, fc2), the down projection is met first; the
   feed-forward's input is then that of the layers before it.
5. A module that first runs a norm on its own input and then the matrices (T5's layers) is entered,
   since the key is taken after the norm. So is a module that wraps attention and feed-forward.

Order of execution alone would do for most models. The test of rule 3 is what makes a parallel
block safe whichever half runs first, and what refuses blocks without a feed-forward (Mamba).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from knnext.lm.running import TRACE_LENGTH, evaluating, first_tensor, trace_inputs

#: Above this share of the change elsewhere, the last position's change is no rounding (rule 3).
_MIXING_SHARE = 0.02


@dataclass
class _Call:
    """One call of a module in the traced pass, with the calls it made itself."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    calls: list[_Call] = field(default_factory=list)

    @property
    def read(self) -> Tensor | None:
        return first_tensor((self.args, self.kwargs))

    @property
    def matrix_calls(self) -> list[_Call]:
        return [c for c in self.calls if _has_matrix(c.module)]

    @property
    def is_leaf(self) -> bool:
        return not self.matrix_calls

    def reads_width(self, width: int) -> bool:
        return self.read is not None and self.read.shape[-1] == width

    def keeps_width(self, width: int) -> bool:
        given = first_tensor(self.output)
        return self.reads_width(width) and given is not None and given.shape[-1] == width


def find_feed_forward(model: nn.Module) -> tuple[str, nn.Module]:
    """(name, module) whose input is what the last block's feed-forward reads.

    ValueError where the rules find none; it lists what ran in the block.
    """
    with evaluating(model):
        block = _trace_last_block(model)
        width = block.read.shape[-1] if block.read is not None else -1
        found = _choose(block, width, bare=True)
        if found is None:
            raise ValueError(_not_found(block))
        found = _after_inner_norm(found)
    return found.name, found.module


def _trace_last_block(model: nn.Module) -> _Call:
    list_name, blocks = _block_list(model)
    names = {id(m): n for n, m in blocks.named_modules(prefix=list_name)}
    stack: list[_Call] = []
    finished: list[_Call] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append(_Call(names[id(module)], module, args, kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = stack.pop()
        call.output = output
        (stack[-1].calls if stack else finished).append(call)

    handles = []
    try:
        for module in blocks.modules():
            if module is not blocks:
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
        model(**trace_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    if not finished:
        raise ValueError(f"no block of {list_name!r} ran in a forward pass; {_how_to_name()}")
    return finished[-1]


def _block_list(model: nn.Module) -> tuple[str, nn.Module]:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if name and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks; {_how_to_name()}")
    # The outer list comes first and holds all that a list of experts inside it holds.
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _choose(parent: _Call, width: int, bare: bool) -> _Call | None:
    calls = parent.matrix_calls
    mixing = [c for c in calls if not c.is_leaf and not _is_positionwise(c)]
    for i in range(len(calls) - 1, -1, -1):
        if calls[i] in mixing:
            continue
        if not calls[i].is_leaf and calls[i].keeps_width(width):
            return calls[i]
        # Bare layers are only trusted beside a module that mixes: else they may be attention's.
        before = _read_before(calls[: i + 1], width) if bare and mixing else None
        if before is not None and before not in mixing:
            return before
    inner = (_choose(c, width, bare=False) for c in reversed(mixing))
    return next((found for found in inner if found is not None), None)


def _read_before(calls: list[_Call], width: int) -> _Call | None:
    """The call before a down projection (the last call) that reads another tensor (rule 4)."""
    down = calls[-1].read
    ups = [c for c in calls[:-1] if c.read is not down and c.reads_width(width)]
    return ups[-1] if ups else None


def _after_inner_norm(call: _Call) -> _Call:
    matrices = call.matrix_calls
    if not matrices:
        return call
    earlier = call.calls[: call.calls.index(matrices[0])]
    normed = any(c.read is call.read and any(True for _ in c.module.parameters()) for c in earlier)
    return _after_inner_norm(matrices[0]) if normed else call


def _is_positionwise(call: _Call) -> bool:
    """Whether changing the earlier positions leaves the last one's output as it was."""
    read = call.read
    if read is None or read.ndim < 2 or read.shape[-2] != TRACE_LENGTH:
        return False
    changed = 2 * read.flip(-1) + 1
    changed[..., -1, :] = read[..., -1, :]
    try:
        was = first_tensor(call.module(*call.args, **call.kwargs))
        args, kwargs = _replace((call.args, call.kwargs), read, changed)
        now = first_tensor(call.module(*args, **kwargs))
    except Exception:  # a module that cannot be run by itself cannot be tested
        return False
    if was is None or now is None or was.shape != now.shape:
        return False
    change = (now.float() - was.float()).abs().flatten(0, -2)
    if change.shape[0] != TRACE_LENGTH:
        return False
    return bool(change[-1].max() <= _MIXING_SHARE * change[:-1].max())


def _replace(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if isinstance(value, dict):
        return {key: _replace(item, old, new) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_replace(item, old, new) for item in value)
    return value


def _how_to_name() -> str:
    return "name the module by hand: key_layer='module:NAME:input' or 'module:NAME:output'"


def _not_found(block: _Call) -> str:
    lines = [
        f"key_layer 'att': the last block, {block.name} ({type(block.module).__name__}), has no "
        "feed-forward that could be told from the rest of it. What ran in it, in order:"
    ]
    for call in block.calls:
        shape = tuple(call.read.shape) if call.read is not None else "no tensor"
        lines.append(f"  {call.name} ({type(call.module).__name__}) read {shape}")
    example = block.calls[-1].name if block.calls else block.name
    return "\n".join([*lines, f"{_how_to_name()}, for one 'module:{example}:input'"])
