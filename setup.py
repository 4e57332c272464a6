"""Builds three binaries with ninja: CPU ops, CUDA ops where they can be, and the host module.

The ops go through PyTorch's stable ABI, so that one binary serves every torch >= 2.10 and the CUDA
library needs neither a GPU nor a CUDA build of torch. torch is only read as files (headers and
libraries), never imported: an isolated build finds the one that is installed around it.

    KNNEXT_CUDA=1 | FORCE_CUDA=1   insist on the CUDA library (also beside a CPU-only torch)
    KNNEXT_CUDA=0                  leave it out
    KNNEXT_LOCAL_VERSION           e.g. cu130: the local label of a wheel's version
    TORCH_CUDA_ARCH_LIST           e.g. "8.0;9.0a+PTX"; CUDA_HOME, MAX_JOBS, NVCC_THREADS, DEBUG
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TARGET = "0x020a000000000000"  # the oldest torch whose stable ABI is used: 2.10
ISA_FLAGS = {
    "_avx2": "-mavx2 -mfma -mf16c",
    "_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c",
}
DEFAULT_ARCHS = "8.0;9.0a+PTX"
VERSION = "0.1.0"


def stop(sentence: str) -> None:
    sys.exit(f"knnext: {sentence}")


@dataclass(frozen=True)
class Torch:
    """The installed torch, as files."""

    root: Path
    version: str
    cuda: str | None

    @property
    def includes(self) -> list[Path]:
        return [self.root / "include", self.root / "include/torch/csrc/api/include"]

    @classmethod
    def find(cls) -> Torch:
        spec = importlib.util.find_spec("torch")
        roots = [Path(spec.origin).parent] if spec and spec.origin else []
        paths = sysconfig.get_paths()
        roots += [Path(paths[kind]) / "torch" for kind in ("platlib", "purelib")]
        root = next((r for r in roots if (r / "version.py").is_file()), None)
        if root is None:
            stop("PyTorch is not installed here; install torch >= 2.10 first, then repeat this.")
        facts: dict[str, object] = {}
        exec((root / "version.py").read_text(), facts)
        version = str(facts["__version__"])
        if tuple(int(x) for x in re.findall(r"\d+", version)[:2]) < (2, 10):
            stop(f"torch {version} is too old: its stable ABI lacks what knnext needs (>= 2.10).")
        return cls(root, version, facts.get("cuda"))


@dataclass(frozen=True)
class Cuda:
    """The CUDA compiler to use and what to compile for."""

    nvcc: str
    version: str
    archs: list[str] = field(default_factory=list)

    @classmethod
    def find(cls, torch: Torch) -> Cuda | None:
        """The compiler, or None where the CUDA library is not to be built; says which."""
        wish = os.environ.get("KNNEXT_CUDA", "1" if os.environ.get("FORCE_CUDA") == "1" else "")
        if wish not in ("", "0", "1"):
            stop(f"KNNEXT_CUDA must be 0, 1 or unset, not {wish!r}.")
        if wish == "0":
            return cls._without("KNNEXT_CUDA=0")
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
        candidates = [str(Path(h) / "bin/nvcc") for h in homes if h]
        found = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
        candidates += [path for path in found if path]
        nvcc = next((path for path in candidates if os.access(path, os.X_OK)), None)
        if nvcc is None:
            if wish == "1":
                stop("the CUDA library was asked for, but no nvcc was found; set CUDA_HOME.")
            return cls._without("no nvcc was found")
        if wish != "1" and torch.cuda is None:
            return cls._without(f"torch {torch.version} has no CUDA (KNNEXT_CUDA=1 insists)")
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+\.\d+)", text)
        if release is None:
            stop(f"could not read the version that {nvcc} prints.")
        archs = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS).strip())
        return cls(nvcc, release.group(1), archs)

    @staticmethod
    def _without(reason: str) -> None:
        print(f"knnext: building the CPU package only: {reason}.", file=sys.stderr)

    def gencode(self, source: Path) -> str:
        """-gencode flags; files in a folder sm90 hold what only Hopper has."""
        flags, hopper = [], source.parent.name == "sm90"
        for arch in self.archs:
            number, _, ptx = arch.partition("+")
            digits = number.replace(".", "")
            if hopper and digits != "90a":
                continue
            flags.append(f"-gencode arch=compute_{digits},code=sm_{digits}")
            if ptx and not hopper:
                # PTX of an "a" target runs on nothing newer; the plain one does.
                plain = digits.rstrip("af")
                flags.append(f"-gencode arch=compute_{plain},code=compute_{plain}")
        return " ".join(flags)


def optimization() -> str:
    return "-O0 -g" if os.environ.get("DEBUG") == "1" else "-O3 -DNDEBUG"


class NinjaFile:
    """The build as text: which sources make which library, with which flags."""

    def __init__(self, torch: Torch, cuda: Cuda | None, build: Path, package: Path) -> None:
        self.torch, self.cuda, self.build, self.package = torch, cuda, build, package
        self.lines: list[str] = []
        self.outputs: list[Path] = []
        self._rules()

    def _rules(self) -> None:
        torch = self.torch
        include = " ".join(f"-isystem {p}" for p in torch.includes)
        link = f"-L{torch.root / 'lib'} -ltorch_cpu -lc10"
        common = f"-std=c++20 {optimization()} -I{CSRC}"
        cxx = os.environ.get("CXX", "g++")
        self.lines += [
            "ninja_required_version = 1.5",
            f"builddir = {self.build}",
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d -fPIC -fvisibility=hidden -Wall -Wextra "
            # gcc 12 sees overlap in std::string's own operator+ (GCC bug 105651).
            f"-Wno-restrict {common} $flags -c $in -o $out",
            "  description = CXX $in",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} -shared -o $out $in $libs",
            "  description = LINK $out",
            f"torch_flags = -DTORCH_TARGET_VERSION={TARGET} {include}",
            f"torch_libs = {link}",
        ]
        if self.cuda:
            threads = os.environ.get("NVCC_THREADS", "1")
            self.lines += [
                "rule nvcc",
                f"  command = {self.cuda.nvcc} -MMD -MF $out.d -t {threads} -Xcompiler "
                f"-fPIC,-fvisibility=hidden {common} -DUSE_CUDA --expt-relaxed-constexpr "
                "-Xptxas -v,--warn-on-spills -lineinfo $flags -c $in -o $out > $out.log 2>&1 "
                "|| (cat $out.log && false)",
                "  description = NVCC $in",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link_cuda",
                f"  command = {self.cuda.nvcc} -shared -cudart static -o $out $in $libs",
                "  description = LINK $out",
            ]

    def library(self, output: Path, sources: list[Path], flags: str, libs: str = "") -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = self.build / output.name.split(".")[0]
        objects = []
        for source in sources:
            objects.append(folder / (str(source.relative_to(CSRC)).replace("/", "_") + ".o"))
            isa_flags = [f for s, f in ISA_FLAGS.items() if source.stem.endswith(s)]
            rule, extra = "cxx", " ".join(isa_flags)
            if source.suffix == ".cu":
                assert self.cuda is not None
                rule, extra = "nvcc", self.cuda.gencode(source)
            self.lines += [f"build {objects[-1]}: {rule} {source}", f"  flags = {flags} {extra}"]
        rule = "link_cuda" if any(s.suffix == ".cu" for s in sources) else "link"
        inputs = " ".join(map(str, objects))
        self.lines += [f"build {output}: {rule} {inputs}", f"  libs = {libs}"]
        self.outputs.append(output)

    def run(self) -> None:
        self.build.mkdir(parents=True, exist_ok=True)
        path = self.build / "build.ninja"
        path.write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        with (self.build / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one tree would mix their objects
            failed = subprocess.run([*command, "-f", str(path), *jobs]).returncode
        if failed:
            stop("the build failed; the compiler's own words are above.")


def sources(pattern: str) -> list[Path]:
    return sorted(CSRC.glob(pattern))


def hopper_flag(cuda: Cuda | None) -> str:
    """-DKNNEXT_BUILT_SM90 where the build carries Hopper's own kernels."""
    return "-DKNNEXT_BUILT_SM90" if cuda and cuda.gencode(Path("sm90/any.cu")) else ""


def add_host_module(ninja: NinjaFile, torch: Torch, cuda: Cuda | None, version: str) -> None:
    import pybind11

    facts = {
        "KNNEXT_VERSION": version,
        "KNNEXT_TORCH_VERSION": torch.version,
        "KNNEXT_CUDA_VERSION": cuda.version if cuda else "",
        "KNNEXT_CUDA_ARCHS": ";".join(cuda.archs) if cuda else "",
    }
    flags = " ".join(f"'-D{name}=\"{value}\"'" for name, value in facts.items())
    flags += f" {hopper_flag(cuda)}"
    # None of torch's headers: with them comes a pybind11 of torch's own, which some versions refuse
    # to compile for the stable ABI.
    python = sysconfig.get_paths()["include"]
    flags += f" -isystem {pybind11.get_include()} -isystem {python}"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    ours = [*sources("host/*.cpp"), *sources("plan/*.cpp"), CSRC / "cpu/isa.cpp"]
    ninja.library(ninja.package / f"_host{suffix}", ours, flags)


class Build(build_ext):
    """Runs ninja once for all the binaries; setuptools only learns where they lie."""

    def run(self) -> None:
        torch = Torch.find()
        cuda = Cuda.find(torch)
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "knnext"
        build = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
        ninja = NinjaFile(torch, cuda, build, package)
        shared = [CSRC / "checks.cpp", CSRC / "complaints.cpp"]
        ops = [CSRC / "library.cpp", *shared, *sources("plan/*.cpp"), *sources("cpu/**/*.cpp")]
        ninja.library(package / "lib/libknnext_cpu.so", ops, "$torch_flags", "$torch_libs")
        cuda_library = package / "lib/libknnext_cuda.so"
        if cuda:
            # The plan of a CPU search asks for the vector path.
            plan = [*sources("plan/*.cpp"), CSRC / "cpu/isa.cpp"]
            kernels = [source for source in sources("cuda/**/*.cu") if cuda.gencode(source)]
            ours = [*shared, *plan, *kernels]
            flags = f"$torch_flags {hopper_flag(cuda)}"
            ninja.library(cuda_library, ours, flags, "$torch_libs -ldl")
        else:
            cuda_library.unlink(missing_ok=True)  # of an earlier build: it would be loaded
        add_host_module(ninja, torch, cuda, self.distribution.get_version())
        ninja.run()

    def get_ext_filename(self, fullname: str) -> str:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        return str(Path(*fullname.split("."))) + str(suffix)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "knnext"
        return [str(p) for p in [*package.glob("lib/*.so"), *package.glob("_host*")]]


if __name__ == "__main__":  # also how build backends run this file; tests import it
    label = os.environ.get("KNNEXT_LOCAL_VERSION")
    setup(
        version=f"{VERSION}+{label}" if label else VERSION,
        ext_modules=[Extension("knnext._host", sources=[])],
        cmdclass={"build_ext": Build},
    )
