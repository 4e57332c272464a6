"""What a benchmark is made of: an implementation under its name, and the cases that run.

A module offers SHAPES, a list for each profile, and IMPLEMENTATIONS. Profiles: `cpu` and `cuda`
are the short lists, `full cpu` and `full cuda` come with --full, `smoke` with --benchmark-disable,
where everything is run and checked but nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

DEVICES = ("cpu", "cuda")
#: Never left out when time runs short: without them the rest says nothing.
ESSENTIAL = ("knnext", "bare")


@dataclass(frozen=True)
class Implementation:
    """`prepare(data)` returns what is timed, or skips with the reason.

    exact: the result is held to float64; if not, only its recall is reported.
    least_recall: below it the run fails, for rivals that are exact by their own account.
    approximate: it trades recall for time on purpose, and every table and picture says so.
    capturable: only enqueues work, so a CUDA graph can hold it.
    own_memory: allocates past torch, so that its memory is read from the device.
    late: is compiled or built for each shape anew, for seconds: on a GPU it comes at the end.
    warm_up: what the library keeps for all its calls, before their memory is looked at.
    shared_index: built once for several shapes, so that its memory belongs to none of them.
    when: the shapes that it is measured at.
    """

    prepare: Callable[[Any], Callable[[], Any]]
    exact: bool = True
    least_recall: float = 0.0
    approximate: bool = False
    capturable: bool = False
    own_memory: bool = False
    late: bool = False
    shared_index: bool = False
    warm_up: Callable[[], None] = lambda: None
    devices: tuple[str, ...] = DEVICES
    when: Callable[[Any], bool] = lambda shape: True

    def takes(self, shape: Any, device: str) -> bool:
        return device in self.devices and self.when(shape)


def profile(device: str, *, full: bool, smoke: bool) -> str:
    return "smoke" if smoke else f"full {device}" if full else device


def available_devices() -> tuple[str, ...]:
    return DEVICES if torch.cuda.is_available() else DEVICES[:1]


def cases(
    shapes: Mapping[str, Sequence[Any]],
    implementations: Mapping[str, Implementation],
    *,
    full: bool = False,
    smoke: bool = False,
    only: Sequence[str] = (),
) -> Iterator[tuple[Any, str, str]]:
    """(shape, device, implementation), rivals of one shape next to each other."""
    for device in available_devices():
        for shape in shapes[profile(device, full=full, smoke=smoke)]:
            for name, implementation in implementations.items():
                if implementation.takes(shape, device) and (not only or name in only):
                    yield shape, device, name


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
