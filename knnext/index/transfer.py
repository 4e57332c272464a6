"""Moving chunks of keys to a GPU while it searches the chunk before.

Two pinned host buffers and two device buffers take turns. A chunk is copied into pinned memory by
the host, sent on a stream of its own, and searched on the caller's stream: the bus and the
kernels work at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class _Slot:
    """One pinned buffer, its twin on the device, and the events that say when each is free."""

    pinned: Tensor
    device: Tensor | None
    sent: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    used: torch.cuda.Event = field(default_factory=torch.cuda.Event)


def prefetch_to_device(
    chunks: Iterator[tuple[int, Tensor]], device: torch.device, *, reuse_buffers: bool
) -> Iterator[tuple[int, Tensor]]:
    """Yield `(start, keys on device)`, always sending one chunk ahead of the one yielded.

    Args:
        chunks: `(start, keys)` on the CPU, keys (n, D); the first chunk is the largest.
        device: a CUDA device.
        reuse_buffers: keys yielded live only until the next one but one is asked for. Without
            it every chunk gets memory of its own and may be kept.
    """
    stream = torch.cuda.Stream(device)
    # Fresh buffers may be memory whose last reader is still queued on the caller's stream.
    stream.wait_stream(torch.cuda.current_stream(device))
    slots: list[_Slot] = []
    waiting: tuple[int, Tensor, _Slot] | None = None
    for number, (start, keys) in enumerate(chunks):
        if number < 2:
            slots.append(_new_slot(keys, device if reuse_buffers else None))
        slot = slots[number % 2]
        slot = slots[number % 2] = _fit(slot, keys, device if reuse_buffers else None)
        sent = _send(keys, slot, stream, device)
        if waiting is not None:
            yield from _receive(*waiting, device)
        waiting = (start, sent, slot)
    if waiting is not None:
        yield from _receive(*waiting, device)


def _new_slot(keys: Tensor, device: torch.device | None) -> _Slot:
    pinned = torch.empty(keys.shape, dtype=keys.dtype, pin_memory=True, device="cpu")
    return _Slot(pinned, None if device is None else torch.empty_like(keys, device=device))


def _fit(slot: _Slot, keys: Tensor, device: torch.device | None) -> _Slot:
    """The slot, or a larger one where this chunk would not fit."""
    if keys.shape[0] <= slot.pinned.shape[0]:
        return slot
    slot.sent.synchronize()
    slot.used.synchronize()
    return _new_slot(keys, device)


def _send(keys: Tensor, slot: _Slot, stream: torch.cuda.Stream, device: torch.device) -> Tensor:
    rows = keys.shape[0]
    slot.sent.synchronize()  # the host may not touch pinned memory that is still being read
    slot.pinned[:rows].copy_(keys)
    with torch.cuda.stream(stream):
        # A buffer of our own is overwritten only after the search that read it.
        stream.wait_event(slot.used)
        if slot.device is None:
            target = torch.empty(keys.shape, dtype=keys.dtype, device=device)
        else:
            target = slot.device[:rows]
            target.record_stream(stream)  # it was made on the caller's
        target.copy_(slot.pinned[:rows], non_blocking=True)
        # A buffer of the caller's stream: whoever drops it may not have it back while this writes.
        target.record_stream(stream)
        slot.sent.record(stream)
    return target


def _receive(
    start: int, keys: Tensor, slot: _Slot, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    current = torch.cuda.current_stream(device)
    current.wait_event(slot.sent)
    keys.record_stream(current)
    yield start, keys
    slot.used.record(current)
