"""Compiles the .cu below csrc/cuda with g++ into one library that runs the kernels on the host.

library = load()                          # a ctypes library, built where it is out of date
call(library.emulate_sum, seed, x, ...)   # tensors and numpy arrays become pointers
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/emulator"
BUILD = ROOT / "build/emulator"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # as nvcc: kernels reinterpret memory as vectors
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # of loop unrolling
    "-DKNNEXT_EMULATOR",
    "-DKNNEXT_BUILT_SM90",
    f"-I{ROOT / 'csrc'}",
    f"-I{ROOT / 'tests'}",
]

SCHEDULER = ("contexts.cpp", "fibers.cpp", "meetings.cpp")


def sources() -> list[Path]:
    """The kernels, the C functions that launch them, and the emulator."""
    kernels = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
    plan = [*sorted((ROOT / "csrc/plan").glob("*.cpp")), ROOT / "csrc/cpu/isa.cpp"]
    return [*sorted(HERE.glob("*.cpp")), *kernels, *plan]


def _newest_header() -> float:
    folders = [HERE, ROOT / "csrc"]
    headers = [h for f in folders for pattern in ("*.h", "*.cuh") for h in f.rglob(pattern)]
    return max(h.stat().st_mtime for h in headers)


def _compile(source: Path, folder: Path, headers: float, extra: list[str]) -> Path:
    output = folder / (str(source.relative_to(ROOT)).replace("/", "_") + ".o")
    if output.is_file() and output.stat().st_mtime > max(headers, source.stat().st_mtime):
        return output
    # The emulator itself must stay unseen by the thread sanitizer: it is not part of the kernel.
    own = [f for f in extra if source.name not in SCHEDULER or "sanitize" not in f]
    command = [os.environ.get("CXX", "g++"), *FLAGS, *own, "-x", "c++", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for the host:\n{done.stderr[-8000:]}")
    return output


def build(
    name: str = "libemulator.so", extra: tuple[str, ...] = (), link: tuple[str, ...] = ("-shared",)
) -> Path:
    """Builds what is out of date; returns the library."""
    folder = BUILD / name.split(".")[0]
    folder.mkdir(parents=True, exist_ok=True)
    headers = _newest_header()
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda s: _compile(s, folder, headers, list(extra)), sources()))
    library = BUILD / name
    newest = max(o.stat().st_mtime for o in objects)
    if not library.is_file() or library.stat().st_mtime < newest:
        command = [os.environ.get("CXX", "g++"), *link, *extra]
        subprocess.run([*command, "-o", str(library), *map(str, objects)], check=True)
    return library


def compiler_found() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


@cache
def load() -> ctypes.CDLL:
    """With EMULATE_TSAN=1 (see race_check.py) every access that no barrier orders is reported."""
    if os.environ.get("EMULATE_TSAN") == "1":
        extra = ("-fsanitize=thread", "-DEMULATE_TSAN")
        return ctypes.CDLL(str(build("libemulator_tsan.so", extra)))
    return ctypes.CDLL(str(build()))


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return value


def call(function: Any, *arguments: Any) -> None:
    """Runs one emulated launch; raises RuntimeError with the emulator's complaint."""
    function.restype = ctypes.c_char_p
    complaint = function(*map(_argument, arguments))
    if complaint is not None:
        raise RuntimeError(complaint.decode())
