"""Builds three binaries with ninja: CPU ops, CUDA ops where they can be, and the host module.

The ops go through PyTorch's stable ABI, so that one binary serves every torch >= 2.10 and the CUDA
library needs neither a GPU nor a CUDA build of torch. torch is only read as files (headers and
libraries), never imported: an isolated build finds the one that is installed around it.

    KNNEXT_CUDA=1 | FORCE_CUDA=1   insist on the CUDA library (also beside a CPU-only torch)
    KNNEXT_CUDA=0                  leave it out
    KNNEXT_LOCAL_VERSION           "auto", or e.g. cu130: the local label of a wheel's version
    TORCH_CUDA_ARCH_LIST           e.g. "8.0;9.0a+PTX"; by default the cards of this machine, and
                                   for a wheel, or without cards, 8.0 to 12.0
    KNNEXT_LINK_FLAGS              what the linker gets first, in words of both g++ and nvcc
    CUDA_HOME, MAX_JOBS, NVCC_THREADS, DEBUG, CXX
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TARGET = "0x020a000000000000"  # the oldest torch whose stable ABI is used: 2.10
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
#: By processor, as the compiler's own macro names it: the endings of files that are compiled for it
#: alone, and the flags that they need. Files with no such ending are for every processor.
VECTOR_PATHS = {
    "__x86_64__": {
        "_avx2": AVX2,
        "_avx2_vnni": f"{AVX2} -mavxvnni",
        "_avx512": AVX512,
        "_avx512_vnni": f"{AVX512} -mavx512vnni",
    },
    "__aarch64__": {"_neon": ""},
}
#: What stands in both libraries of ops.
SHARED = ("checks", "complaints", "caller", "stable_compat")
#: Where TORCH_CUDA_ARCH_LIST is not set and no card is in sight: what nvcc knows of these, and PTX
#: of the last for what comes after it.
DEFAULT_ARCHS = ("8.0", "9.0a", "10.0", "12.0")
OLDEST_ARCH = 80
#: The names that torch's own builds know.
ARCH_NAMES = {
    "kepler": "3.5", "maxwell": "5.0;5.2", "pascal": "6.0;6.1", "volta": "7.0", "turing": "7.5",
    "ampere": "8.0;8.6+PTX", "ampere+tegra": "8.7", "ada": "8.9+PTX", "hopper": "9.0+PTX",
    "blackwell": "10.0;10.3;12.0;12.1+PTX", "blackwell+tegra": "11.0",
}  # fmt: skip
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
        # Where each Python's environment links to one torch, what is compiled once serves all.
        root = next((r.resolve() for r in roots if (r / "version.py").is_file()), None)
        if root is None:
            stop(
                f"PyTorch is not installed in {sys.prefix}; install torch >= 2.10 first, then "
                "repeat this. If that is no environment of yours: uv builds in one of its own, "
                "which sees no torch; uv pip install setuptools ninja pybind11, then the same as "
                "before with --no-build-isolation."
            )
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
    def find(cls, torch: Torch, for_here: bool = True) -> Cuda | None:
        """The compiler, or None where the CUDA library is not to be built; says which.

        ``for_here``: the library need only run on the cards of this machine, where it has some.
        """
        wish = os.environ.get("KNNEXT_CUDA", "1" if os.environ.get("FORCE_CUDA") == "1" else "")
        if wish not in ("", "0", "1"):
            stop(f"KNNEXT_CUDA must be 0, 1 or unset, not {wish!r}.")
        if wish == "0":
            return cls._without("KNNEXT_CUDA=0")
        if wish != "1" and torch.cuda is None:
            return cls._without(f"torch {torch.version} has no CUDA (KNNEXT_CUDA=1 insists)")
        homes = {n: os.environ[n] for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)}
        if not (wish or homes or _arch_wish() or has_driver()):
            return cls._without("no NVIDIA driver is here (KNNEXT_CUDA=1 insists)")
        nvcc = find_nvcc(homes)
        if nvcc is None:
            if wish == "1":
                stop("the CUDA library was asked for, but no nvcc was found; set CUDA_HOME.")
            return cls._without("no nvcc was found")
        visible = visible_archs() if for_here else []
        if visible and not wish and not any(map(_is_new_enough, visible)) and not _arch_wish():
            return cls._without(f"the cards here ({', '.join(visible)}) are older than 8.0")
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+\.\d+)", text)
        if release is None:
            stop(f"could not read the version that {nvcc} prints.")
        archs = choose_archs(known_archs(nvcc), visible)
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


def find_nvcc(homes: dict[str, str]) -> str | None:
    """The first nvcc of the toolkits that are named, else the one that is about."""
    named = [(name, str(Path(home) / "bin/nvcc")) for name, home in homes.items()]
    for name, nvcc in named:
        if not os.access(nvcc, os.X_OK):
            # Another one may be of another CUDA: the wheel would not be what it is called.
            stop(f"{name}={homes[name]} holds no bin/nvcc; name a CUDA toolkit, or unset it.")
    about = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    candidates = [nvcc for _, nvcc in named] + [path for path in about if path]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or bool(visible_archs())


def local_version(wish: str | None) -> str:
    """ "+cu130", "+cpu" or nothing. What is wished must be what the build is; "auto" is that."""
    if not wish:
        return ""
    cuda = Cuda.find(Torch.find(), for_here=False)
    built = f"cu{cuda.version.replace('.', '')}" if cuda else "cpu"
    if wish not in ("auto", built) and re.fullmatch(r"cpu|cu\d+", wish):
        stop(f"KNNEXT_LOCAL_VERSION={wish}, but this build would be {built}; say auto, or change "
             "CUDA_HOME or KNNEXT_CUDA.")  # fmt: skip
    return f"+{built if wish == 'auto' else wish}"


def known_archs(nvcc: str) -> set[str]:
    """Digits, as ``"90"``, of what this nvcc compiles for; empty where it does not tell."""
    text = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return set(re.findall(r"compute_(\d+)", text))


def visible_archs() -> list[str]:
    """Compute capabilities of this machine's cards, as ``["8.0", "9.0"]``."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted(set(re.findall(r"^\d+\.\d+$", text, flags=re.MULTILINE)))


def choose_archs(known: set[str], visible: list[str]) -> list[str]:
    """What to compile for, as ``["8.0", "9.0a", "12.0+PTX"]``.

    Images preset TORCH_CUDA_ARCH_LIST for other packages, so what cannot be built is passed over
    with a line; only where nothing is left is that an error.
    """
    wish = _arch_wish()
    if not wish:
        chosen = list(filter(_is_new_enough, visible))
        if not chosen:
            chosen = [
                a for a in DEFAULT_ARCHS if not known or a.rstrip("a").replace(".", "") in known
            ]
            chosen[-1:] = [f"{arch}+PTX" for arch in chosen[-1:]]
        wish = ";".join(chosen)
    entries = [e for part in re.split(r"[;,\s]+", wish) for e in _spelled_out(part).split(";") if e]
    kept = list(dict.fromkeys(arch for arch in map(partial(_buildable, known), entries) if arch))
    if not kept:
        stop(
            f"TORCH_CUDA_ARCH_LIST={wish!r} names nothing that can be built; wanted are compute "
            'capabilities from 8.0 on that nvcc knows, such as "8.0;9.0a+PTX".'
        )
    return kept


def _arch_wish() -> str:
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,\t\n")
    return "" if wish.lower() == "native" else wish


def _is_new_enough(arch: str) -> bool:
    return int(arch.replace(".", "")) >= OLDEST_ARCH


def _spelled_out(entry: str) -> str:
    name, plus, rest = entry.lower().partition("+")
    named = ARCH_NAMES.get(entry.lower()) or ARCH_NAMES.get(name if rest == "ptx" else "")
    return entry if named is None else named + ("+PTX" if plus and "+PTX" not in named else "")


def _buildable(known: set[str], entry: str) -> str | None:
    """The entry as it is compiled, or None, with a line that says why it is passed over."""
    match = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d)([af]?)(\+PTX)?", entry, re.IGNORECASE)
    digits = match[1] + match[2] if match else ""
    if match is None:
        reason = "it is no compute capability"
    elif not _is_new_enough(digits):
        reason = "the kernels need 8.0 or later"
    elif known and digits not in known:
        reason = "this nvcc does not know it"
    else:
        # Hopper's own kernels need the "a"; code of it runs wherever plain 9.0's does.
        suffix = "a" if digits == "90" else match[3].lower()
        return f"{match[1]}.{match[2]}{suffix}{(match[4] or '').upper()}"
    print(f"knnext: not compiled for {entry}: {reason}.", file=sys.stderr)
    return None


def optimization() -> str:
    return "-O0 -g" if os.environ.get("DEBUG") == "1" else "-O3 -DNDEBUG"


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def check_compiler() -> None:
    """Say what is missing before ninja says it once a file."""
    if shutil.which(shlex.split(compiler())[0]) is None:
        stop(
            f"no C++ compiler: {compiler()} was not found; install one that knows C++20 (Debian: "
            "apt install g++, Fedora: dnf install gcc-c++), or name it with CXX."
        )


def vector_paths() -> dict[str, str]:
    """Endings and flags of the files for the target, which is the compiler's and not the host."""
    command = [*shlex.split(compiler()), "-dM", "-E", "-x", "c++", os.devnull]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        stop(f"{compiler()} does not tell what it compiles for: {asked.stderr.strip()}")
    defined = set(re.findall(r"^#define (\w+)", asked.stdout, flags=re.MULTILINE))
    return next((paths for macro, paths in VECTOR_PATHS.items() if macro in defined), {})


def compiled_for(paths: dict[str, str], source: Path) -> bool:
    """Whether a file is for the target: named after one of its vector paths, or after none."""
    endings = [ending for family in VECTOR_PATHS.values() for ending in family]
    return all(ending in paths for ending in endings if source.stem.endswith(ending))


def as_path(path: Path) -> str:
    """A path where ninja reads paths: their ends are spaces and colons."""
    return re.sub(r"[$: ]", r"$\g<0>", str(path))


def as_word(word: object) -> str:
    """One word of a command that ninja gives to a shell, whatever is in it."""
    return shlex.quote(str(word)).replace("$", "$$")


class NinjaFile:
    """The build as text: which sources make which library, with which flags."""

    def __init__(self, torch: Torch, cuda: Cuda | None, build: Path, package: Path) -> None:
        self.torch, self.cuda, self.build, self.package = torch, cuda, build, package
        self.vector_paths = vector_paths()
        self.lines: list[str] = []
        self.outputs: list[Path] = []
        self._rules()

    def _rules(self) -> None:
        torch = self.torch
        include = " ".join(f"-isystem {as_word(p)}" for p in torch.includes)
        link = f"-L{as_word(torch.root / 'lib')} -ltorch_cpu -lc10"
        common = f"-std=c++20 {optimization()} -I{as_word(CSRC)}"
        cxx = compiler().replace("$", "$$")
        first = os.environ.get("KNNEXT_LINK_FLAGS", "").replace("$", "$$")
        self.lines += [
            "ninja_required_version = 1.5",
            f"builddir = {str(self.build).replace('$', '$$')}",
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d -fPIC -fvisibility=hidden -Wall -Wextra "
            # gcc 12 sees overlap in std::string's own operator+ (GCC bug 105651).
            f"-Wno-restrict {common} $flags -c $in -o $out",
            "  description = CXX $in",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} -shared -o $out $in {first} $libs",
            "  description = LINK $out",
            f"torch_flags = -DTORCH_TARGET_VERSION={TARGET} {include}",
            f"torch_libs = {link}",
        ]
        if self.cuda:
            threads = os.environ.get("NVCC_THREADS", "1")
            nvcc = as_word(self.cuda.nvcc)
            self.lines += [
                "rule nvcc",
                f"  command = {nvcc} -MMD -MF $out.d -t {threads} -Xcompiler "
                f"-fPIC,-fvisibility=hidden {common} -DUSE_CUDA --expt-relaxed-constexpr "
                # Another toolkit in the same folder compiles anew: the label says which it was.
                f"-DKNNEXT_NVCC={self.cuda.version} "
                "-Xptxas -v,--warn-on-spills -lineinfo $flags -c $in -o $out > $out.log 2>&1 "
                "|| (cat $out.log && false)",
                "  description = NVCC $in",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link_cuda",
                f"  command = {nvcc} -shared -cudart static -o $out $in {first} $libs",
                "  description = LINK $out",
            ]

    def library(self, output: Path, sources: list[Path], flags: str, libs: str = "") -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = self.build / output.name.removesuffix(".so")
        objects = []
        for source in sources:
            if not compiled_for(self.vector_paths, source):
                continue
            objects.append(folder / (str(source.relative_to(CSRC)).replace("/", "_") + ".o"))
            isa_flags = [f for s, f in self.vector_paths.items() if source.stem.endswith(s)]
            rule, extra = "cxx", " ".join(isa_flags)
            if source.suffix == ".cu":
                assert self.cuda is not None
                rule, extra = "nvcc", self.cuda.gencode(source)
            made, of = as_path(objects[-1]), as_path(source)
            self.lines += [f"build {made}: {rule} {of}", f"  flags = {flags} {extra}"]
        rule = "link_cuda" if any(s.suffix == ".cu" for s in sources) else "link"
        inputs = " ".join(map(as_path, objects))
        self.lines += [f"build {as_path(output)}: {rule} {inputs}", f"  libs = {libs}"]
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
    flags += f" -isystem {as_word(pybind11.get_include())} -isystem {as_word(python)}"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    ours = [*sources("host/*.cpp"), *sources("plan/*.cpp"), CSRC / "cpu/isa.cpp"]
    ninja.library(ninja.package / f"_host{suffix}", ours, flags)


class Build(build_ext):
    """Runs ninja once for all the binaries; setuptools only learns where they lie."""

    def run(self) -> None:
        torch = Torch.find()
        check_compiler()
        in_place = self.inplace or getattr(self, "editable_mode", False)
        cuda = Cuda.find(torch, for_here=bool(in_place))
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "knnext"
        # Wheels share the ops, whatever Python they are for, and hold the code of more cards.
        name = f"ninja-{sys.implementation.cache_tag}" if in_place else "ninja-wheel"
        build = ROOT / "build" / name
        ninja = NinjaFile(torch, cuda, build, package)
        shared = [CSRC / f"{name}.cpp" for name in SHARED]
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
    setup(
        version=VERSION + local_version(os.environ.get("KNNEXT_LOCAL_VERSION")),
        ext_modules=[Extension("knnext._host", sources=[])],
        cmdclass={"build_ext": Build},
        # A path in place of an import hook, which type checkers could not follow. From here and not
        # from pyproject.toml, of which setuptools warns at every build that this is experimental.
        options={"editable_wheel": {"mode": "compat"}},
    )
