"""Models that torch.compile has been at, whole or block by block.

Code that is compiled knows only the hooks that were there when it was compiled, so what is read by
a hook is read from modules that run as they are written. For the length of a block torch runs all
code so (``uncompiled``), where a module that is hooked lies in compiled code. ``compile_blocks``
leaves that one block alone in which keys are read, and the others stay fast.
"""

from __future__ import annotations

import importlib
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from knnext.errors import KnnextWarning, MissingPackageError
from knnext.lm.block_trace import BlockTrace
from knnext.lm.running import evaluating
from knnext.lm.wrapped import COMPILED_NAME


def is_compiled(module: nn.Module) -> bool:
    """Whether this module's own call goes through code that torch.compile made."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    if isinstance(module.__dict__.get("_modules", {}).get(COMPILED_NAME), nn.Module):
        return True
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def compiled_around(model: nn.Module, hooked: nn.Module) -> list[str]:
    """Names of the compiled modules that ``hooked``, a part of ``model``, lies in or is."""
    modules = dict(model.named_modules())
    name = next((n for n, module in modules.items() if module is hooked), "")
    parts = name.split(".") if name else []
    paths = [".".join(parts[:end]) for end in range(len(parts) + 1)]
    return [path for path in paths if is_compiled(modules[path])]


class _Stance:
    """Torch's stance is one for all threads: the first that wants it sets it, the last resets."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.setting: Any = None


_STANCE = _Stance()


@contextmanager
def uncompiled(model: nn.Module, *hooked: nn.Module) -> Iterator[None]:
    """Within, hooks on ``hooked``, parts of ``model`` (none given: on any part), are seen.

    Where that takes the speed of what is compiled it is warned of, unless ``hooked`` is left out.
    """
    if hooked:
        names = [name for module in hooked for name in compiled_around(model, module)]
    else:
        names = [name for name, module in model.named_modules() if is_compiled(module)]
    if not names:
        yield
        return
    if hooked:
        warnings.warn(
            f"{type(model).__name__} runs uncompiled: keys are read inside of "
            f"{names[0] or 'the model'}, which is compiled, and compiled code takes no hooks. "
            "load_lm(compile=True), or --compile, compiles all blocks but the one that is read",
            KnnextWarning,
            stacklevel=4,
        )
    with _STANCE.lock:
        _STANCE.users += 1
        if _STANCE.users == 1:
            _STANCE.setting = torch.compiler.set_stance("force_eager")
            _STANCE.setting.__enter__()
    try:
        yield
    finally:
        with _STANCE.lock:
            _STANCE.users -= 1
            if _STANCE.users == 0:
                setting, _STANCE.setting = _STANCE.setting, None
                setting.__exit__(None, None, None)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of the model at its first call, but for the last, in which keys are read.

    A model of many equal blocks is compiled once for all of them. ImportError or RuntimeError where
    torch lacks what it compiles with.
    """
    check_compiler(model)
    with evaluating(model):
        trace = BlockTrace(model)
    last = trace.block.module
    for block in trace.peers():
        if block is not last:
            block.compile()


def check_compiler(model: nn.Module) -> None:
    devices = {parameter.device.type for parameter in model.parameters()}
    if "cuda" in devices:
        try:
            importlib.import_module("triton")
        except ImportError as error:
            text = "compile on a GPU needs triton: pip install triton"
            raise MissingPackageError(text, name="triton") from error
    elif not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise RuntimeError("compile on the CPU needs a C++ compiler such as g++, and none is here")
