"""Loads the compiled ops, and puts the plain PyTorch reference where one is missing.

Two libraries, both without Python in them: ``libknnext_cpu.so`` holds the schemas and the CPU
kernels, ``libknnext_cuda.so`` the CUDA kernels where the package was built with them. The second
waits until this process uses CUDA, or somebody asks: an import asks nothing of CUDA, and processes
forked after it may still use it.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knnext import reference
from knnext.errors import KnnextWarning
from knnext.ops._cards import can_run, cuda_driver_version
from knnext.ops._checks import CHECKS, VALUE_CHECKS
from knnext.ops._gradients import GRADIENTS
from knnext.ops._schemas import GRADIENT_NAMES, GRADIENT_SCHEMAS, NAMES, SCHEMAS

__all__ = [
    "COMPOSED",
    "LIBRARIES",
    "REPORT",
    "FallbackWarning",
    "cuda_driver_version",
    "cuda_symbols",
]

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 256 << 20  # of keys on their way to a GPU
LIBRARIES = Path(__file__).resolve().parent.parent / "lib"


class FallbackWarning(KnnextWarning):
    """The compiled library is missing or cannot run; plain PyTorch runs in its place."""


class LoadReport:
    """What was loaded and why; ``knnext doctor`` prints it.

    ``cpu`` and ``cuda`` are "", or say why the compiled library does not run there; ``fallbacks``
    lists what plain PyTorch stands in for, as "CPU knn_search". To look at the last two decides
    them, if CUDA was not in use yet.
    """

    def __init__(self, cpu: str) -> None:
        self.cpu = cpu
        self._cuda: str | None = None
        self._fallbacks: list[str] = []
        self._lock = threading.RLock()

    @property
    def cuda(self) -> str:
        self.decide_cuda()
        return self._cuda or ""

    @property
    def fallbacks(self) -> list[str]:
        self.decide_cuda()
        return self._fallbacks

    def decide_cuda(self) -> None:
        """Loads the CUDA library if it can run here. Once; never fails."""
        with self._lock:
            if self._cuda is None:
                self._cuda = ""  # can_run asks no more than once, whatever comes of it
                self._cuda = self._load_cuda()

    def _load_cuda(self) -> str:
        in_use = torch.cuda.is_available()
        if self.cpu:
            reason = "the CPU library holds the schemas that it needs"
        else:
            library = LIBRARIES / "libknnext_cuda.so"
            # Without a card, nothing can go wrong there.
            reason = can_run(*built_for()) if in_use and library.is_file() else ""
            reason = reason or _load(library)
        if in_use:
            missing = _install_fallbacks("CUDA")
            self._fallbacks += [f"CUDA {name}" for name in missing]
            if missing:
                _WARN_ON_USE["CUDA"] = _warning(
                    "CUDA", missing, reason or "not among the CUDA kernels of this version"
                )
        return reason


def built_for() -> tuple[str, str]:
    """CUDA version and architectures of the CUDA library; empty where nothing says."""
    try:
        from knnext import _host
    except ImportError:
        return "", ""
    built = _host.build_info()
    return built["cuda_version"], built["cuda_archs"]


def _load(path: Path) -> str:
    """Loads one library; returns "" or the reason why not."""
    if not path.is_file():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} did not load: {error}"
    _introduce_python(path)
    return ""


def _introduce_python(path: Path) -> None:
    """Hands the library, which knows no Python, what signals and exceptions are here."""
    try:
        from knnext import _host
    except ImportError:  # it runs without: deaf to Ctrl-C, and with plain RuntimeErrors
        return
    ctypes.CDLL(str(path)).knnext_set_caller(ctypes.c_void_p(_host.caller()))


def _fallback(name: str, key: str) -> Any:
    base = name.split(".")[0]
    compute = getattr(reference, base)
    check = CHECKS[base]
    check_values = VALUE_CHECKS.get(base) if key == "CPU" else None

    def run(*args: Any, **kwargs: Any) -> Any:
        if warning := _WARN_ON_USE.pop(key, ""):
            warnings.warn(warning, FallbackWarning, stacklevel=2)
        check(*args, **kwargs)
        if check_values:
            check_values(*args, **kwargs)
        with torch.no_grad():
            return compute(*args, **kwargs)

    return run


def _search_codes_on_cuda(
    queries: Tensor,
    keys: Tensor,
    codes: Tensor,
    code_stats: Tensor,
    center: Tensor,
    k: int,
    metric: str = "l2",
    *,
    index_offset: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The search without codes, which gives the same bits; keys on the CPU come in chunks."""
    CHECKS["knn_search_codes"](
        queries, keys, codes, code_stats, center, k, metric, index_offset=index_offset, **options
    )
    search = torch.ops.knnext.knn_search.default
    if keys.device == queries.device:
        return search(queries, keys, k, metric, index_offset=index_offset, **options)
    norms = options.pop("key_sqnorms", None)
    step = max(1, _CHUNK_BYTES // (keys.shape[1] * keys.element_size()))
    for start in range(0, max(1, len(keys)), step):
        rows = slice(start, start + step)
        options["init_distances"], options["init_indices"] = result = search(
            queries,
            keys[rows].to(queries.device, non_blocking=True),
            k,
            metric,
            key_sqnorms=None if norms is None else norms[rows],
            index_offset=index_offset + start,
            **options,
        )
    return result


def _encode_on_cuda(keys: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    CHECKS["encode_keys"](keys, center)
    return reference.encode_keys(keys, center)


#: Ops that on CUDA are made of others, until they have kernels there; what they are made of.
COMPOSED: dict[str, tuple[str, Any]] = {
    "encode_keys": ("PyTorch's own ops", _encode_on_cuda),
    "knn_search_codes": ("knn_search", _search_codes_on_cuda),
}


def _gradient_fallback(name: str) -> Any:
    compute = GRADIENTS[name.split(".")[0]]

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return compute(*args)

    return run


def _install_fallbacks(key: str) -> list[str]:
    """Puts the reference where no kernel is; returns the names of these ops."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in GRADIENT_NAMES:
        if not has(f"knnext::{name}", key):
            _KEEP.impl(name, _gradient_fallback(name), key)
    missing = [name for name in NAMES if not has(f"knnext::{name}", key)]
    for name in missing:
        _KEEP.impl(name, _fallback(name, key), key)
    return missing


def _warning(key: str, missing: list[str], reason: str) -> str:
    every = {*missing, *COMPOSED} >= {*NAMES}  # what is composed has nothing to stand in for
    which = "all ops" if every else ", ".join(missing)
    return f"knnext: plain PyTorch, slow, stands in on {key} for {which}: {reason}"


def load() -> LoadReport:
    """Loads what the CPU needs. Called once, on import."""
    report = LoadReport(_load(LIBRARIES / "libknnext_cpu.so"))
    _log.debug("ops of the CPU: %s", report.cpu or "loaded")
    if report.cpu:
        for schema in (*SCHEMAS, *GRADIENT_SCHEMAS):
            _KEEP.define(schema)
    for name, (_, run) in COMPOSED.items():
        _KEEP.impl(name, run, "CUDA")
    missing = _install_fallbacks("CPU")
    report._fallbacks += [f"CPU {name}" for name in missing]
    if missing:
        reason = report.cpu or "not among the CPU kernels of this build"
        warnings.warn(_warning("CPU", missing, reason), FallbackWarning, stacklevel=2)
    if torch.version.cuda or torch.version.hip:
        # Run when torch starts CUDA, which comes before any tensor there; now, if it has.
        torch.cuda._lazy_call(report.decide_cuda)
    return report


def cuda_symbols() -> list[str]:
    """The ops that the loaded libraries run on CUDA, as the dispatcher knows them."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    fallbacks = {f.removeprefix("CUDA ") for f in REPORT.fallbacks if f.startswith("CUDA ")}
    others = {*fallbacks, *COMPOSED}
    return [n for n in NAMES if has(f"knnext::{n}", "CUDA") and n not in others]


# What the first call of a stand-in says, by dispatch key.
_WARN_ON_USE: dict[str, str] = {}
# Python-side definitions live as long as this object.
_KEEP = torch.library.Library("knnext", "FRAGMENT")
REPORT = load()
