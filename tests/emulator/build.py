"""Compiles the .cu below csrc/cuda with g++ into one library that runs the kernels on the host.

library = load()                          # a ctypes library, built where it is out of date
call(library.emulate_sum, seed, x, ...)   # tensors and numpy arrays become pointers
"""

from __future__ import annotations

import ctypes
import fcntl
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
COMPILER = os.environ.get("CXX", "g++")
FLAGS = [
    "-std=c++20",
    "-O1",
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
#: What the sources begin with: reading it is most of what each costs, so it is compiled first.
DOOR = "door.h"


def sources() -> list[Path]:
    """The kernels, the C functions that launch them, and the emulator."""
    kernels = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
    plan = [*sorted((ROOT / "csrc/plan").glob("*.cpp")), ROOT / "csrc/cpu/isa.cpp"]
    return [*sorted(HERE.glob("*.cpp")), *kernels, *plan]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: failed\n{done.stderr[-8000:]}")


def is_new(output: Path, *more: Path) -> bool:
    """Whether it is newer than all that it was made of: what the compiler has listed, and more."""
    listed = Path(f"{output}.d")
    if not (output.is_file() and listed.is_file()):
        return False
    names = listed.read_text().partition(":")[2].replace("\\\n", " ").split()
    made, paths = output.stat().st_mtime_ns, [*map(Path, names), *more]
    return all(path.is_file() and path.stat().st_mtime_ns < made for path in paths)


def _compile(source: Path, folder: Path, extra: tuple[str, ...]) -> Path:
    """The object of a source, or the precompiled form of the door; an old one that still serves."""
    kind, ending = ("c++-header", ".gch") if source.name == DOOR else ("c++", ".o")
    name = source.relative_to(folder if source.name == DOOR else ROOT)
    output = folder / (str(name).replace("/", "_") + ending)
    door = () if source.name == DOOR else (folder / f"{DOOR}.gch",)  # which no list names
    if is_new(output, *door):
        return output
    flags = [*FLAGS, *extra]
    if source.name in SCHEDULER:
        # The emulator itself must stay unseen by the thread sanitizer: it is no part of a kernel.
        flags = [flag for flag in flags if "sanitize" not in flag]
    elif source.name != DOOR:
        flags += ["-include", str(folder / DOOR)]
    flags += ["-MMD", "-MF", f"{output}.d"]
    _run(COMPILER, *flags, "-x", kind, "-c", str(source), "-o", str(output))
    return output


def build(name: str = "libemulator.so", extra: tuple[str, ...] = ()) -> Path:
    """Builds what is out of date, in one process at a time; returns the library."""
    folder = BUILD / name.split(".")[0]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        door = folder / DOOR
        if not door.is_file():
            door.write_text('#include "cuda/device.cuh"\n')
        _compile(door, folder, extra)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda s: _compile(s, folder, extra), sources()))
        library = BUILD / name
        newest = max(o.stat().st_mtime for o in objects)
        if not library.is_file() or library.stat().st_mtime < newest:
            _run(COMPILER, "-shared", *extra, "-o", str(library), *map(str, objects))
    return library


def compiler_found() -> bool:
    return shutil.which(COMPILER) is not None


@cache
def load() -> ctypes.CDLL:
    """With EMULATE_TSAN=1 (see race_check.py) every access that no barrier orders is reported."""
    if os.environ.get("EMULATE_TSAN") == "1":
        extra = ("-g1", "-fsanitize=thread", "-DEMULATE_TSAN")
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
