"""Where something is to be computed, checked before torch fails in words of its own."""

from __future__ import annotations

import torch


def checked_device(device: torch.device | str | int, name: str = "device") -> torch.device:
    """As torch has it. ValueError, with what there is, for a device that is not here."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{name} must be such as cpu, cuda or cuda:1, got {device!r}") from None
    if found.type != "cuda":
        return found
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        build = f"torch {torch.__version__} was built without CUDA"
        reason = "torch sees no GPU" if torch.backends.cuda.is_built() else build
        raise ValueError(f"{name} {device}: {reason}; `knnext doctor` tells more")
    if (found.index or 0) >= count:
        raise ValueError(f"{name} {device}: the GPUs here are cuda:0 to cuda:{count - 1}")
    return found
