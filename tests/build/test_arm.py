"""64-bit ARM: every CPU file compiles for it, and its vector path gives the plain path's bits.

The cross compiler and qemu stand in for the machine (Debian: g++-aarch64-linux-gnu, qemu-user).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
ARM = "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"
#: What the vector paths are made of, and nothing of torch but two header-only types.
KERNELS = ["cpu/isa.cpp", "cpu/search/candidates.cpp", "cpu/search/tile_plain.cpp"]
KERNELS += ["cpu/search/tile_neon.cpp", "cpu/vector/row_loops.cpp", "cpu/vector/row_loops_neon.cpp"]
#: Of the search by codes.
CODES = ["bound", "encoder", "rotation", "loops_plain", "loops_neon"]

CPU_FILES = [str(path.relative_to(CSRC)) for pattern in ("*.cpp", "plan/*.cpp", "cpu/**/*.cpp")
             for path in sorted(CSRC.glob(pattern))]  # fmt: skip


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("no source tree beside the tests")
    spec = importlib.util.spec_from_file_location("knnext_setup_arm", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compile_command(build, monkeypatch) -> list[str]:
    """The compiler with the flags that setup.py gives each file of the CPU library."""
    monkeypatch.setenv("CXX", ARM)
    includes = [part for path in build.Torch.find().includes for part in ("-isystem", str(path))]
    target = f"-DTORCH_TARGET_VERSION={build.TARGET}"
    warnings = ["-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    return [ARM, "-std=c++20", "-O2", *warnings, f"-I{CSRC}", target, *includes]


def cpu_sources(build: ModuleType) -> list[Path]:
    return [
        CSRC / name for name in CPU_FILES if build.compiled_for(build.vector_paths(), CSRC / name)
    ]


@pytest.mark.parametrize(
    ("macro", "compiled", "flags"),
    [
        ("__x86_64__", {"_avx2", "_avx512"}, "-mavx2"),
        ("__aarch64__", {"_neon"}, ""),
        ("__riscv", set(), ""),
    ],
)
def test_the_target_decides_which_files_are_compiled(build, monkeypatch, tmp_path, macro,
                                                     compiled, flags):  # fmt: skip
    compiler = tmp_path / "target-g++"
    compiler.write_text(f"#!/bin/sh\necho '#define {macro} 1'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -O1")
    torch = build.Torch(tmp_path, "2.13.0", None)
    ninja = build.NinjaFile(torch, None, tmp_path / "build", tmp_path / "knnext")
    ninja.library(tmp_path / "libknnext_cpu.so", build.sources("cpu/**/*.cpp"), "")
    text = "\n".join(ninja.lines)
    named = set(re.findall(r"_(?:tile|row_loops)(_\w+)\.cpp\.o: cxx", text))
    assert named == compiled | {"_plain"}
    assert ("-mavx" in text) == bool(flags)
    link = re.search(r"build \S+libknnext_cpu.so: link (.*)", text)
    assert link is not None and ("avx2" in link[1], "neon" in link[1]) == (
        "_avx2" in compiled,
        "_neon" in compiled,
    )


def test_a_compiler_that_names_no_target_is_an_error(build, monkeypatch, tmp_path):
    compiler = tmp_path / "broken-g++"
    compiler.write_text("#!/bin/sh\necho 'no licence' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(SystemExit, match="does not tell what it compiles for: no licence"):
        build.vector_paths()


@pytest.mark.slow
@needs(ARM, QEMU)
def test_neon_gives_the_bits_of_the_plain_path(compile_command, tmp_path):
    program = tmp_path / "vector_paths"
    files = [str(CSRC / name) for name in KERNELS]
    driver = str(Path(__file__).with_name("vector_paths.cpp"))
    subprocess.run([*compile_command, "-static", driver, *files, "-o", program], check=True)
    done = subprocess.run([QEMU, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.fullmatch(r"neon: (\d+) values, 0 failures\n", done.stdout)
    assert counted is not None and int(counted[1]) > 1_000_000

    for wish, said in (("plain", "plain: "), ("avx2", "must be plain or neon, not avx2")):
        forced = subprocess.run(
            [QEMU, "-E", f"KNNEXT_CPU_ISA={wish}", program], capture_output=True, text=True
        )
        assert said in forced.stdout + forced.stderr


@pytest.mark.slow
@needs(ARM, QEMU)
def test_neon_multiplies_codes_exactly_and_its_bounds_hold(compile_command, tmp_path):
    program = tmp_path / "code_paths"
    names = [*KERNELS[:4], "cpu/search/bound.cpp", *(f"cpu/codes/{name}.cpp" for name in CODES)]
    drivers = [ROOT / "tests/ops/code_bounds.cpp", Path(__file__).with_name("code_paths.cpp")]
    files = [*(CSRC / name for name in names), *drivers]
    subprocess.run([*compile_command, "-static", *map(str, files), "-o", program], check=True)
    done = subprocess.run([QEMU, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.fullmatch(r"codes: (\d+) checks, 0 failures\n", done.stdout)
    assert counted is not None and int(counted[1]) > 50_000


@needs(ARM)
def test_no_file_of_another_processor_is_among_them(build, compile_command):
    names = {path.name for path in cpu_sources(build)}
    assert {"library.cpp", "knn_search.cpp", "tile_neon.cpp"} <= names
    assert not [name for name in names if "avx" in name]


@pytest.mark.slow
@needs(ARM)
@pytest.mark.parametrize("name", CPU_FILES)
def test_every_cpu_file_compiles_for_arm(build, compile_command, name):
    if not build.compiled_for(build.VECTOR_PATHS["__aarch64__"], CSRC / name):
        pytest.skip("of another processor")
    command = [*compile_command, "-Wno-restrict", "-fsyntax-only", str(CSRC / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
