"""A model's hidden states over a token stream: the datastore's keys and the search's queries.

The stream is read in windows (knnext/lm/windows.py), across documents or not. The state at position
i is paired with the token at i + 1; the last position has no next token and no row. Each of the
positions 0 .. T - 2 comes exactly once, in order, and this is counted.

The grid of windows and batches depends on the stream alone and not on ``start`` or ``stop``: a
resumed run repeats the forward passes of the batch it stopped in, and gives the same bits. So do
runs that share a stream, where each goes from one of ``batch_ends`` to another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from knnext.lm.batching import choose_batch_size, length_matters
from knnext.lm.forward import ModelForward
from knnext.lm.key_layer import (
    KEY_LAYERS,
    CapturedStates,
    KeyModule,
    capture_hidden_states,
    find_key_module,
    find_key_modules,
)
from knnext.lm.running import context_length, num_known_tokens
from knnext.lm.windows import Windows, check_documents, half_stride

__all__ = [
    "KEY_LAYERS",
    "CapturedStates",
    "HiddenStatesBatch",
    "KeyModule",
    "batch_ends",
    "capture_hidden_states",
    "default_block_size",
    "find_key_module",
    "find_key_modules",
    "hidden_states",
]

_MAX_DEFAULT_BLOCK = 1024
#: Devices that work on a batch while the one before it is copied and written.
_AHEAD = {"cuda"}


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
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float16,
    with_log_p_lm: bool = False,
    with_logits: bool = False,
    start: int = 0,
    stop: int | None = None,
    bos: int | None = None,
    separate_documents: Any = False,
    full_last_window: bool = False,
) -> Iterator[HiddenStatesBatch]:
    """Yields the states of positions ``start`` .. T - 2 in order, one batch of windows at a time.

    ``stop`` ends before that position instead.

    ``tokens`` (T,): integers, as array, tensor or list; or ``TokenizedDocuments``. ``key_layer``
    may join layers: ``"att+ffn"`` gives the states of both side by side. ``block_size`` defaults to
    the model's context (at most 1,024), ``stride`` to half of it, ``batch_size`` (full windows at
    once) to what suits the device and fits into its memory. ``dtype`` is that of the keys.
    ``with_log_p_lm`` adds the targets' log-probabilities, computed in float32 over a bounded number
    of rows at a time; ``with_logits`` adds the whole (n, V) logits. The output layer runs once, and
    only for rows that are given. The model is left as it was, also on an error and between batches.
    ``bos`` is a token that every window begins with, in the place of the first one that it sees;
    that one gives no state there, so ``stride`` must be below ``block_size``.

    ``separate_documents``: no state sees another document than its own. True for
    ``TokenizedDocuments``; for other tokens the places where documents begin, and T. The state of a
    document's last position is still paired with the token at which the next one begins.
    ``full_last_window``: see ``Windows.over``.

    Arguments are checked here and not at the first batch. ValueError for bad arguments, and for
    keys that overflow ``dtype``.
    """
    stream, documents = _stream_of(model, tokens, separate_documents)
    block = default_block_size(model) if block_size is None else block_size
    step = half_stride(max(1, block)) if stride is None else stride
    windows = Windows.over(len(stream), block, step, documents, full_last=full_last_window)
    logits = with_log_p_lm or with_logits
    batch = choose_batch_size(model, block, logits=logits) if batch_size is None else batch_size
    _check_batch_size(batch)
    last = _check_range(start, stop, max(0, len(stream) - 1))
    if bos is not None and bool((~windows.heads & (windows.begins == windows.gives)).any()):
        raise ValueError(
            f"stride must be below block_size={block} where every window begins with bos, got "
            f"{step}: a window's first token is then bos, and cannot be due a state "
            "(--no-bos-each-window, bos=None)"
        )
    keys = find_key_modules(model, key_layer)
    forward = ModelForward(model, keys, with_log_p_lm, with_logits)
    shelves = list(windows.shelves(batch, most=1) if with_logits else windows.shelves(batch))
    grid = _Grid(windows, shelves, batch, length_matters(model, block))
    return _batches(forward, stream, grid, dtype, start, last, bos)


def batch_ends(
    length: int,
    block_size: int,
    stride: int,
    batch_size: int,
    separate_documents: Any = None,
    full_last_window: bool = False,
) -> np.ndarray:
    """(batches,) int64, ascending: the position after the last that each batch of windows gives.

    Of a stream of ``length`` tokens. Runs of ``hidden_states`` that start and stop at these do the
    same forward passes as one that goes from the beginning to the end.
    """
    _check_batch_size(batch_size)
    documents = None
    if separate_documents is not None and separate_documents is not False:
        documents = check_documents(separate_documents, length)
    windows = Windows.over(length, block_size, stride, documents, full_last=full_last_window)
    ends = [int(windows.ends[last - 1]) for _, last in windows.shelves(batch_size)]
    return np.asarray(ends, dtype=np.int64)


def _stream_of(
    model: nn.Module, tokens: Any, separate: Any
) -> tuple[Tensor, NDArray[np.int64] | None]:
    """The stream, and the places of its documents where they are to be kept apart."""
    places = getattr(tokens, "document_offsets", None)
    stream = _checked_tokens(model, tokens if places is None else tokens.tokens)
    if separate is None or separate is False:
        return stream, None
    if separate is True and places is None:
        raise ValueError(
            "separate_documents=True wants TokenizedDocuments, which know where documents begin; "
            "beside plain tokens give the places themselves"
        )
    return stream, check_documents(places if separate is True else separate, len(stream))


def _checked_tokens(model: nn.Module, tokens: Any) -> Tensor:
    array = np.asarray(tokens.cpu() if isinstance(tokens, Tensor) else tokens)
    if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(
            f"tokens must be one-dimensional integers, got {array.dtype} of shape {array.shape}"
        )
    size = num_known_tokens(model)
    if array.size and (array.min() < 0 or array.max() >= size):
        raise ValueError(
            f"tokens must lie in [0, {size}), the model's vocabulary; got "
            f"{array.min()} to {array.max()}: are they of another tokenizer?"
        )
    return torch.from_numpy(array.astype(np.int32))  # half of what a long text takes as int64


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _check_range(start: int, stop: int | None, count: int) -> int:
    """The position to stop before."""
    if not 0 <= start <= count:
        raise ValueError(f"start must be from 0 to {count}, got {start}")
    if stop is not None and not start <= stop <= count:
        raise ValueError(f"stop must be from start={start} to {count}, got {stop}")
    return count if stop is None else stop


class _Grid(NamedTuple):
    """Windows, those that are given together, how many full ones are read at once, and whether
    none may be filled up."""

    windows: Windows
    shelves: list[tuple[int, int]]
    batch_size: int
    one_length: bool


def _batches(
    forward: ModelForward,
    stream: Tensor,
    grid: _Grid,
    dtype: torch.dtype,
    start: int,
    stop: int,
    bos: int | None,
) -> Iterator[HiddenStatesBatch]:
    given, ahead = start, None
    for shelf in grid.shelves:
        begin, end = int(grid.windows.gives[shelf[0]]), int(grid.windows.ends[shelf[1] - 1])
        low, high = max(begin, start), min(end, stop)
        if low >= high:
            continue  # it was given before the run that is resumed here, or is another's
        if low != given:
            break
        rows = _Rows(low, high)
        for chosen in grid.windows.batches(shelf, grid.batch_size, one_length=grid.one_length):
            ids, positions = _cells_of(stream, grid.windows, chosen, bos)
            rows.run(forward, ids, positions, stream, dtype)
        given = high
        if ahead is not None:
            yield ahead.batch(forward, stream, dtype)
        ahead = rows
        if forward.device.type not in _AHEAD:
            yield ahead.batch(forward, stream, dtype)
            ahead = None
    if ahead is not None:
        yield ahead.batch(forward, stream, dtype)
    if given != stop:
        raise RuntimeError(f"hidden_states gave rows up to {given} of {stop}: a defect in knnext")


def _cells_of(
    stream: Tensor, windows: Windows, chosen: NDArray[np.int64], bos: int | None
) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) of some windows, and the position that each cell gives, -1 for none.

    A shorter window is filled up at its right with its last token, and gives nothing there; a
    causal model needs no mask for that, as nothing before it can see it.
    """
    begins, ends, gives = (
        torch.from_numpy(part[chosen])[:, None]
        for part in (windows.begins, windows.ends, windows.gives)
    )
    positions = begins + torch.arange(int((ends - begins).max()), device="cpu")
    ids = stream[torch.minimum(positions, ends - 1)].long()
    if bos is not None:
        ids[torch.from_numpy(~windows.heads[chosen]), 0] = bos  # a document has its own head
    return ids, torch.where((positions >= gives) & (positions < ends), positions, -1)


class _Rows:
    """Rows [low, high) of the stream, as the forward passes give them, in any order."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high, self.filled = low, high, 0
        self.keys: Tensor | None = None
        self.log_p: Tensor | None = None
        self.logits: Tensor | None = None
        self.bounds: list[Tensor] = []

    def run(
        self,
        forward: ModelForward,
        ids: Tensor,
        positions: Tensor,
        stream: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """One forward pass, where it gives any of these rows."""
        wanted = (positions >= self.low) & (positions < self.high)
        places = positions[wanted]
        if not len(places):
            return
        device = forward.device
        states, log_p, logits = forward(
            ids.to(device), wanted, stream[places + 1].long().to(device)
        )
        self.filled += len(places)
        whole = len(places) == self.high - self.low and bool((places.diff() == 1).all())
        rows = None if whole else places - self.low
        # The extremes carry any NaN or infinity, and are found faster than all are looked at.
        self.bounds += states.aminmax()
        self.keys = self._put(self.keys, states.to(dtype), rows)
        self.log_p = self._put(self.log_p, log_p, rows)
        self.logits = self._put(self.logits, logits, rows)

    def _put(self, held: Any, found: Any, rows: Tensor | None) -> Any:
        if found is None or rows is None:  # all of them at once, in order
            return found
        if held is None:
            held = found.new_empty(self.high - self.low, *found.shape[1:])
        held[rows.to(held.device)] = found
        return held

    def batch(self, forward: ModelForward, stream: Tensor, dtype: torch.dtype) -> HiddenStatesBatch:
        """All of them, looked at for what does not fit."""
        if self.filled != self.high - self.low or self.keys is None:
            raise RuntimeError("hidden_states lost or repeated a position: a defect in knnext")
        bounds = torch.stack(self.bounds)
        if not bool(bounds.to(dtype).isfinite().all()):
            largest = bounds.abs().amax().item()
            raise ValueError(
                f"the hidden states of {' and '.join(map(str, forward.keys))} do not fit {dtype} "
                f"(largest magnitude {largest:.4g}): use dtype=torch.bfloat16 or torch.float32"
            )
        positions = torch.arange(self.low, self.high, device=forward.device)
        targets = stream[self.low + 1 : self.high + 1].long().to(forward.device)
        return HiddenStatesBatch(positions, self.keys, targets, self.log_p, self.logits)
