"""In which dtype a model is loaded where nobody has said it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

#: What ``model_dtype`` may be: "auto" looks at the device, "checkpoint" takes what the files hold.
MODEL_DTYPES = {
    "auto": None,
    "checkpoint": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_FAST_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # the last one is ARM's
_CPUINFO = Path("/proc/cpuinfo")


def check_model_dtype(model_dtype: str | torch.dtype) -> str:
    """The name of a dtype that is given as a name or as torch's own. ValueError for others."""
    name = str(model_dtype).removeprefix("torch.")
    if name not in MODEL_DTYPES:
        raise ValueError(
            f"model_dtype must be one of {', '.join(MODEL_DTYPES)}; got {model_dtype!r}"
        )
    return name


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 by instructions of its own (AMX, AVX-512 BF16).

    Only oneDNN does so; a torch without it is slower with bfloat16 on any processor.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux: not known, and float32 is right anywhere
        return False
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    return bool(lines) and all(_FAST_FLAGS & set(line.split()) for line in lines)


def dtype_to_load(name: str, declared: Any, device: str, *, gguf: bool) -> torch.dtype | str:
    """What ``from_pretrained`` is given as dtype: a dtype, or "auto" for the checkpoint's own.

    ``name``: of ``MODEL_DTYPES``. ``declared``: the checkpoint's dtype as its config states it, or
    None. "auto" on a CPU: bfloat16 for a checkpoint in bfloat16, or one of GGUF's quantized types,
    where the processor has it fast; else float32, which holds every 16-bit value. On other devices
    the checkpoint's own; of a GGUF file it is what transformers unpacks to, float32 as a rule.
    """
    chosen = MODEL_DTYPES[name]
    if chosen is not None:
        return chosen
    if name == "checkpoint" or torch.device(device).type != "cpu":
        return "auto"
    narrow = gguf or declared == torch.bfloat16
    if declared is None and not gguf:
        return "auto"  # known when it is read; see ``too_narrow``
    return torch.bfloat16 if narrow and fast_bfloat16() else torch.float32


def too_narrow(dtype: torch.dtype, name: str, device: str) -> bool:
    """Whether "auto" would not have a model in this dtype on this device."""
    if name != "auto" or torch.device(device).type != "cpu":
        return False
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not fast_bfloat16())
