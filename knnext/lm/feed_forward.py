"""Finds the feed-forward of a model's last block by what its modules do in one forward pass.

The rules, none of which knows a model's name or the size of its weights:

1. The block's own calls are taken in order (knnext/lm/block_trace.py). Those of modules that hold
   a matrix are kept: that leaves attention and feed-forward and drops norms and activations.
2. A feed-forward works on each position alone. What it reads at one position has a derivative
   in the block's output at that position, and one of exactly 0 at every later one
   (knnext/lm/positions.py).
3. It is the last such module that reads and gives the block's width and holds two matrices or
   more. A module of modules comes before one that holds its matrices bare (experts beside a dense
   feed-forward), and both before layers that lie bare in the block (fc1, activation, fc2). Of
   those the down projection is met first, and the key is what the layers before it read.
4. A module that first runs a norm on its own input and then the matrices (T5's layers) is entered,
   since the key is taken after the norm. So is a module that wraps attention and feed-forward.

Order of execution alone would do for most models. Rule 2 makes a parallel block safe whichever
half runs first, and refuses blocks without a feed-forward (Mamba); rule 3 passes by routers, and
by gates for per-layer embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from knnext.lm.block_trace import BlockTrace, Call, how_to_name, num_matrices
from knnext.lm.running import evaluating, first_tensor


@dataclass(frozen=True)
class FeedForward:
    """The module whose input is the key; ``norm`` names the norm that gave it, or is empty."""

    name: str
    module: nn.Module
    norm: str


def find_feed_forward(model: nn.Module) -> FeedForward:
    """The module whose input is what the last block's feed-forward reads.

    ValueError where the rules find none; it lists what ran in the block.
    """
    with evaluating(model):
        trace = BlockTrace(model)
        found = _choose(trace, trace.block, outermost=True)
        if found is None:
            raise ValueError(_not_found(trace.block))
        found = _after_inner_norm(found)
        return FeedForward(found.name, found.module, _norm_before(trace.root, found))


def _choose(trace: BlockTrace, parent: Call, outermost: bool) -> Call | None:
    calls = parent.matrix_calls
    mixing = [c for c in calls if not c.is_leaf and not trace.alone(c, c)]
    if not outermost and not mixing:
        return None  # an attention, whose projections work on each position alone too
    wide = [c for c in calls if c.keeps_width(trace.widths) and num_matrices(c.module) > 1]
    whole = [c for c in reversed(wide) if not c.is_leaf and c not in mixing]
    fused = [c for c in reversed(wide) if c.is_leaf]
    for call in (*whole, *fused):
        if trace.alone(call, parent):
            return call
    if outermost and mixing and whole:
        return whole[0]  # something after it mixes: a convolution, say
    # Bare layers are only trusted beside a module that mixes: else they may be attention's.
    if outermost and mixing:
        for i in range(len(calls) - 1, 0, -1):
            before = None if calls[i] in mixing else _read_before(calls[: i + 1], trace.widths)
            if before is not None and before not in mixing and trace.alone(before, parent):
                return before
    inner = (_choose(trace, c, outermost=False) for c in reversed(mixing))
    return next((found for found in inner if found is not None), None)


def _read_before(calls: list[Call], widths: set[int]) -> Call | None:
    """The call before a down projection (the last call) that reads another tensor."""
    down = calls[-1].read
    ups = [c for c in calls[:-1] if c.read is not down and c.reads_width(widths)]
    return ups[-1] if ups else None


def _after_inner_norm(call: Call) -> Call:
    matrices = call.matrix_calls
    if not matrices or call.read is None:
        return call
    earlier = call.calls[: call.calls.index(matrices[0])]
    normed = any(_same(c.read, call.read) and _is_norm(c) for c in earlier)  # no matrix in it
    return _after_inner_norm(matrices[0]) if normed else call


def _norm_before(root: Call, found: Call) -> str:
    """The name of the norm whose output ``found`` reads, "" where it reads something else."""
    givers = [c for c in root.walk() if _same(c.given, found.read)]
    return next((c.name for c in reversed(givers) if _is_norm(c)), "")


def _is_norm(call: Call) -> bool:
    """Whether the module gives (nearly) the same for its input and for thrice that."""
    if call.read is None or call.given is None:
        return False
    try:
        large = 1e3 * call.read / call.read.abs().mean().clamp_min(1e-12)
        once, thrice = first_tensor(call.module(large)), first_tensor(call.module(3 * large))
    except Exception:  # more than one argument: a rotary embedding, a dropout of two
        return False
    if once is None or thrice is None or once.shape != large.shape:
        return False
    change = (thrice.float() - once.float()).abs().max()
    return bool(change <= 0.05 * once.float().abs().max())


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are one, or views of one in another shape."""
    if a is None or b is None:
        return False
    return a is b or (a.numel() == b.numel() and a.data_ptr() == b.data_ptr())


def _not_found(block: Call) -> str:
    lines = [
        f"key_layer 'att': the last block, {block.name} ({type(block.module).__name__}), has no "
        "feed-forward that could be told from the rest of it. What ran in it, in order:"
    ]
    for call in block.calls:
        shape = tuple(call.read.shape) if call.read is not None else "no tensor"
        lines.append(f"  {call.name} ({type(call.module).__name__}) read {shape}")
    example = block.calls[-1].name if block.calls else block.name
    return "\n".join([*lines, f"{how_to_name()}, for one 'module:{example}:input'"])
