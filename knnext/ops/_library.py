"""Loads the compiled ops, and puts the plain PyTorch reference where one is missing.

Two libraries, both without Python in them: ``libknnext_cpu.so`` holds the schemas and the CPU
kernels, ``libknnext_cuda.so`` the CUDA kernels where the package was built with them.
"""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from knnext import reference
from knnext.ops._checks import CHECKS, VALUE_CHECKS
from knnext.ops._gradients import GRADIENTS
from knnext.ops._schemas import GRADIENT_NAMES, GRADIENT_SCHEMAS, NAMES, SCHEMAS

LIBRARIES = Path(__file__).resolve().parent.parent / "lib"


class FallbackWarning(UserWarning):
    """The compiled library is missing or did not load; plain PyTorch runs in its place."""


@dataclass
class LoadReport:
    """What was loaded and why; ``knnext doctor`` prints it."""

    cpu: str = ""
    cuda: str = ""
    fallbacks: list[str] = field(default_factory=list)  # "CPU knn_search", ...


def _load(path: Path) -> str:
    """Loads one library; returns "" or the reason why not."""
    if not path.is_file():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} did not load: {error}"
    return ""


def _fallback(name: str, key: str) -> Any:
    base = name.split(".")[0]
    compute = getattr(reference, base)
    check = CHECKS[base]
    check_values = VALUE_CHECKS.get(base) if key == "CPU" else None

    def run(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        if check_values:
            check_values(*args, **kwargs)
        with torch.no_grad():
            return compute(*args, **kwargs)

    return run


def _gradient_fallback(name: str) -> Any:
    compute = GRADIENTS[name.split(".")[0]]

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return compute(*args)

    return run


def _install_fallbacks(key: str, reason: str, report: LoadReport) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in GRADIENT_NAMES:
        if not has(f"knnext::{name}", key):
            _KEEP.impl(name, _gradient_fallback(name), key)
    missing = [name for name in NAMES if not has(f"knnext::{name}", key)]
    for name in missing:
        _KEEP.impl(name, _fallback(name, key), key)
    report.fallbacks += [f"{key} {name}" for name in missing]
    if missing:
        which = "all ops" if len(missing) == len(NAMES) else ", ".join(missing)
        warnings.warn(
            f"knnext: plain PyTorch, slow, stands in on {key} for {which}: {reason}",
            FallbackWarning,
            stacklevel=2,
        )


def load() -> LoadReport:
    """Loads what there is. Called once, on import."""
    report = LoadReport(cpu=_load(LIBRARIES / "libknnext_cpu.so"))
    if report.cpu:
        for schema in (*SCHEMAS, *GRADIENT_SCHEMAS):
            _KEEP.define(schema)
        report.cuda = "the CPU library holds the schemas that it needs"
    else:
        report.cuda = _load(LIBRARIES / "libknnext_cuda.so")
    _install_fallbacks("CPU", report.cpu or "not among the CPU kernels of this build", report)
    if torch.cuda.is_available():
        reason = report.cuda or "not among the CUDA kernels of this version"
        _install_fallbacks("CUDA", reason, report)
    return report


def cuda_symbols() -> list[str]:
    """The ops that the loaded libraries run on CUDA, as the dispatcher knows them."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    fallbacks = {f.removeprefix("CUDA ") for f in REPORT.fallbacks if f.startswith("CUDA ")}
    return [n for n in NAMES if has(f"knnext::{n}", "CUDA") and n not in fallbacks]


def cuda_driver_version() -> int | None:
    """What the NVIDIA driver supports, e.g. 13000; None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


# Python-side definitions live as long as this object.
_KEEP = torch.library.Library("knnext", "FRAGMENT")
REPORT = load()
