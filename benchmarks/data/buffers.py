"""How many sets of buffers a benchmark needs, so that no call finds its data in the cache."""

from __future__ import annotations

import math

import torch

#: A cache that a device does not tell of counts as large as an H100's.
DEFAULT_L2 = 50 << 20


def l2_bytes(device: torch.device | str) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "L2_cache_size", 0) or DEFAULT_L2)


def rotations(bytes_per_call: float, l2: int, most: int = 1024) -> int:
    """How many sets of buffers make a whole turn exceed twice the L2."""
    return min(most, max(1, math.ceil(2 * l2 / max(1.0, bytes_per_call))))
