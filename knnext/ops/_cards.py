"""Which NVIDIA cards the compiled CUDA library can run on here, by the driver's own word.

``libcuda`` is asked through ctypes: compute capability and driver version need no context. It is
asked only once somebody uses CUDA: ``cuInit`` would make processes forked later unable to.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

OLDEST = 80  # sm_80: asynchronous copies, bfloat16 on the tensor cores
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_ARCH = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """A card that this process may use, and its compute capability: 80 for sm_80."""

    name: str
    capability: int


def _libcuda() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def cuda_driver_version() -> int | None:
    """What the NVIDIA driver supports, e.g. 13000; None where there is no driver."""
    driver, version = _libcuda(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value


def visible_cards() -> list[Card]:
    """Empty where the driver names none, or does not start."""
    driver, count, device = _libcuda(), ctypes.c_int(), ctypes.c_int()
    if driver is None or driver.cuInit(0) != 0:
        return []
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    cards = []
    for i in range(count.value):
        name, numbers = ctypes.create_string_buffer(256), []
        failed = driver.cuDeviceGet(ctypes.byref(device), i)
        failed |= driver.cuDeviceGetName(name, len(name), device)
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            failed |= driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        if not failed:
            text = name.value.decode(errors="replace")
            cards.append(Card(text, 10 * numbers[0] + numbers[1]))
    return cards


def can_run(toolkit: str, archs: str, cards: Sequence[Card] | None = None) -> str:
    """ "" where the CUDA library can run on a card at hand, else the reason why not.

    Args:
        toolkit: the CUDA version that built it, such as "13.0"; "" where that is not known.
        archs: what it was built for, such as "8.0, 9.0a, 12.0+PTX"; "" where not known.
        cards: those in question; by default all that this process may use, of which one that can
            is enough.
    """
    if torch.version.hip:
        return f"this torch is built for ROCm {torch.version.hip}, and the kernels for NVIDIA cards"
    needs, has = _as_number(toolkit), cuda_driver_version()
    if has is not None and needs is not None and has // 1000 < needs // 1000:
        return (
            f"the NVIDIA driver is for CUDA {_as_text(has)} and the library was built with CUDA "
            f"{toolkit}: it needs a driver for CUDA {needs // 1000}, or a build with CUDA "
            f"{has // 1000}"
        )
    cards = visible_cards() if cards is None else cards
    reasons = [_why_not(card, archs, has, needs) for card in cards]
    if not cards or not all(reasons):  # where the driver says nothing, torch knows better
        return ""
    return "; ".join(dict.fromkeys(reasons))


def _why_not(card: Card, archs: str, driver: int | None, toolkit: int | None) -> str:
    what = f"{card.name} is sm_{card.capability}"
    if card.capability < OLDEST:
        return f"{what}, and the kernels need sm_{OLDEST} or later"
    built = _ARCH.findall(archs)
    if not built or any(_serves(arch, card, driver, toolkit) for arch in built):
        return ""
    listed = ", ".join(archs.replace(";", " ").replace(",", " ").split())
    return (
        f"{what}, and the library was built for {listed} alone: build it on this machine, or with "
        f"TORCH_CUDA_ARCH_LIST={card.capability // 10}.{card.capability % 10}"
    )


def _serves(
    arch: tuple[str, str, str, str], card: Card, driver: int | None, toolkit: int | None
) -> bool:
    major, minor, kind, ptx = arch
    capability = 10 * int(major) + int(minor)
    # "a" is for that card alone, and its PTX, if any, is the plain one.
    same = card.capability // 10 == int(major) and card.capability >= capability
    if card.capability == capability or (same and kind != "a"):
        return True
    # The driver compiles PTX, if it knows what the toolkit wrote.
    new_enough = driver is None or toolkit is None or driver >= toolkit
    return bool(ptx) and card.capability >= capability and new_enough


def _as_number(version: str) -> int | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    return 1000 * int(found[1]) + 10 * int(found[2]) if found else None


def _as_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
