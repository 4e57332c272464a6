"""A model's hidden states over a token stream: the datastore's keys and the search's queries.

The stream is read in windows of ``block_size`` tokens that advance by ``stride``. A window gives
only the states that no earlier one gave: its last ``stride`` (the first window: all), so past the
first window each state has seen at least ``block_size - stride`` tokens before it. The state at
position i is paired with the token at i + 1; the last position has no next token and no row. Each
of the positions 0 .. T - 2 comes exactly once, in order, and this is counted.

The grid of windows and batches depends on the stream alone and not on ``start`` or ``stop``: a
resumed run repeats the forward pass of the batch it stopped in, and gives the same bits. So do runs
that share a stream, where each goes from one of ``batch_ends`` to another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from knnext.lm.forward import ModelForward
from knnext.lm.key_layer import (
    KEY_LAYERS,
    CapturedStates,
    KeyModule,
    capture_hidden_states,
    find_key_module,
)
from knnext.lm.running import context_length

__all__ = [
    "KEY_LAYERS",
    "CapturedStates",
    "HiddenStatesBatch",
    "KeyModule",
    "batch_ends",
    "capture_hidden_states",
    "default_block_size",
    "find_key_module",
    "hidden_states",
]

_MAX_DEFAULT_BLOCK = 1024


@dataclass
class HiddenStatesBatch:
    """Consecutive rows of the stream, on the model's device.

    ``positions`` (n,) int64: where each state stands. ``keys`` (n, D). ``targets`` (n,) int64:
    the tokens at ``positions + 1``. ``log_p_lm`` (n,) float32: the model's log-probability of the
    targets, or None. ``lm_logits`` (n, V), or None.
    """

    positions: Tensor
    keys: Tensor
    targets: Tensor
    log_p_lm: Tensor | None = None
    lm_logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)


def default_block_size(model: nn.Module) -> int:
    """The model's own context length, at most 1,024 tokens."""
    return min(context_length(model) or _MAX_DEFAULT_BLOCK, _MAX_DEFAULT_BLOCK)


def hidden_states(
    model: nn.Module,
    tokens: Any,
    *,
    key_layer: str | KeyModule = "att",
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float16,
    with_log_p_lm: bool = False,
    with_logits: bool = False,
    start: int = 0,
    stop: int | None = None,
    bos: int | None = None,
) -> Iterator[HiddenStatesBatch]:
    """Yields the states of positions ``start`` .. T - 2 in order, one batch of windows at a time.

    ``stop`` ends before that position instead.

    ``tokens`` (T,): integers, as array, tensor or list. ``block_size`` defaults to the model's
    context (at most 1,024), ``stride`` to half of it. ``dtype`` is that of the keys.
    ``with_log_p_lm`` adds the targets' log-probabilities, computed in float32 over a bounded
    number of rows at a time; ``with_logits`` adds the whole (n, V) logits. The output layer runs
    once, and only for rows that are given. The model is left as it was, also on an error and
    between batches. ``bos`` is a token that every window begins with, in the place of the first
    one that it sees; that one gives no state there, so ``stride`` must be below ``block_size``.

    Arguments are checked here and not at the first batch. ValueError for bad arguments, and for
    keys that overflow ``dtype``.
    """
    stream = _checked_tokens(model, tokens)
    block = default_block_size(model) if block_size is None else block_size
    step = max(1, block // 2) if stride is None else stride
    _check_windows(block, step, batch_size)
    last = _check_range(start, stop, max(0, len(stream) - 1))
    if bos is not None and step == block and len(stream) - 1 > block:
        raise ValueError(
            f"stride must be below block_size={block} where every window begins with bos, got "
            f"{step}: a window's first token is then bos, and cannot be due a state "
            "(--no-bos-each-window, bos=None)"
        )
    key = find_key_module(model, key_layer)
    forward = ModelForward(model, key, with_log_p_lm, with_logits)
    return _stream(forward, stream, block, step, batch_size, dtype, start, last, bos)


def batch_ends(length: int, block_size: int, stride: int, batch_size: int) -> np.ndarray:
    """(batches,) int64, ascending: the position after the last that each batch of windows gives.

    Of a stream of ``length`` tokens. Runs of ``hidden_states`` that start and stop at these do the
    same forward passes as one that goes from the beginning to the end.
    """
    count = max(0, length - 1)
    _check_windows(block_size, stride, batch_size)
    ends = [end for _, _, end in _batches(count, block_size, stride, batch_size)]
    return np.asarray(ends, dtype=np.int64)


def _checked_tokens(model: nn.Module, tokens: Any) -> Tensor:
    array = np.asarray(tokens.cpu() if isinstance(tokens, Tensor) else tokens)
    if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(
            f"tokens must be one-dimensional integers, got {array.dtype} of shape {array.shape}"
        )
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if array.size and (array.min() < 0 or array.max() >= size):
        raise ValueError(
            f"tokens must lie in [0, {size}), the model's vocabulary; got "
            f"{array.min()} to {array.max()}: are they of another tokenizer?"
        )
    return torch.from_numpy(array.astype(np.int64))


def _check_windows(block: int, stride: int, batch_size: int) -> None:
    if block < 1:
        raise ValueError(f"block_size must be at least 1, got {block}")
    if not 1 <= stride <= block:
        raise ValueError(f"stride must be from 1 to block_size={block}, got {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _check_range(start: int, stop: int | None, count: int) -> int:
    """The position to stop before."""
    if not 0 <= start <= count:
        raise ValueError(f"start must be from 0 to {count}, got {start}")
    if stop is not None and not start <= stop <= count:
        raise ValueError(f"stop must be from start={start} to {count}, got {stop}")
    return count if stop is None else stop


def _stream(
    forward: ModelForward,
    stream: Tensor,
    block: int,
    stride: int,
    batch_size: int,
    dtype: torch.dtype,
    start: int,
    stop: int,
    bos: int | None,
) -> Iterator[HiddenStatesBatch]:
    count = max(0, len(stream) - 1)  # rows, and tokens that the model reads
    given = start
    for first, last, batch_end in _batches(count, block, stride, batch_size):
        if given == stop:
            break
        if batch_end <= given:
            continue  # all of it was given before the run that is resumed here, or is another's
        end = min(batch_end, stop)
        ids, rows = _window_batch(stream, count, block, stride, first, last)
        if bos is not None:
            ids[1 if first == 0 else 0 :, 0] = bos  # the first window has the stream's own head
        low = max(given, _first_new(first, block, stride))
        wanted = (rows >= low) & (rows < end)
        yield _batch(forward, ids, wanted, stream, low, end, dtype)
        given = end
    if given != stop:
        raise RuntimeError(f"hidden_states gave rows up to {given} of {stop}: a defect in knnext")


def _batches(
    count: int, block: int, stride: int, batch_size: int
) -> Iterator[tuple[int, int, int]]:
    """(first window, the one after the last, position after the last given) of each batch."""
    windows = _num_windows(count, block, stride)
    for first in range(0, windows, batch_size):
        last = min(first + batch_size, windows)
        yield first, last, min((last - 1) * stride + block, count)


def _num_windows(count: int, block: int, stride: int) -> int:
    return 0 if count == 0 else 1 + max(0, -(-(count - block) // stride))


def _first_new(window: int, block: int, stride: int) -> int:
    """The first position that window gives and the one before it did not reach."""
    return 0 if window == 0 else (window - 1) * stride + block


def _window_batch(
    stream: Tensor, count: int, block: int, stride: int, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) and the position that each cell gives, -1 where it gives none.

    The last window may be short. Its right side is filled with a token of the stream and gives
    nothing; a causal model needs no mask for that, as nothing before it can see it.
    """
    length = min(block, count)
    starts = torch.arange(first, last, device="cpu") * stride
    positions = starts[:, None] + torch.arange(length, device="cpu")
    new_from = torch.tensor(
        [_first_new(w, block, stride) for w in range(first, last)], dtype=torch.int64, device="cpu"
    )
    gives = (positions >= new_from[:, None]) & (positions < count)
    ids = stream[positions.clamp(max=count - 1)]
    return ids, torch.where(gives, positions, -1)


def _batch(
    forward: ModelForward,
    ids: Tensor,
    wanted: Tensor,
    stream: Tensor,
    low: int,
    end: int,
    dtype: torch.dtype,
) -> HiddenStatesBatch:
    device = forward.device
    targets = stream[low + 1 : end + 1].to(device)
    if int(wanted.sum()) != end - low:
        raise RuntimeError("hidden_states lost or repeated a position: a defect in knnext")
    states, log_p, logits = forward(ids.to(device), wanted.to(device), targets)
    keys = states.to(dtype)
    if not bool(torch.isfinite(keys).all()):
        raise ValueError(
            f"the hidden states of {forward.key} do not fit {dtype} (largest magnitude "
            f"{states.abs().max().item():.4g}): use dtype=torch.bfloat16 or torch.float32"
        )
    positions = torch.arange(low, end, device=device)
    return HiddenStatesBatch(positions, keys, targets, log_p, logits)
