"""The decisions of setup.py: which torch, whether CUDA, which flags; and what was built."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA_VARIABLES = ("KNNEXT_CUDA", "FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("no source tree beside the tests")
    spec = importlib.util.spec_from_file_location("knnext_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["knnext_setup"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CUDA_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def fake_torch(folder: Path, version: str, cuda: str | None) -> None:
    root = folder / "torch"
    root.mkdir(parents=True)
    (root / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")


def find_in(build: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> object:
    """Torch.find() in a process that can import no torch, with this site-packages."""
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        build.sysconfig,
        "get_paths",
        lambda: dict.fromkeys(("platlib", "purelib", "include"), str(folder)),
    )
    return build.Torch.find()


def fake_nvcc(folder: Path, release: str = "13.0") -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def test_without_torch_the_build_ends_in_one_sentence(build, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stop:
        find_in(build, monkeypatch, tmp_path)
    message = str(stop.value)
    assert "PyTorch is not installed" in message and "install torch >= 2.10" in message
    assert sys.prefix in message and "--no-build-isolation" in message, "uv's builds see no torch"
    assert "\n" not in message


def test_an_isolated_build_finds_the_torch_around_it(build, monkeypatch, tmp_path):
    fake_torch(tmp_path, "2.11.0+cu130", "13.0")
    torch = find_in(build, monkeypatch, tmp_path)
    assert (torch.version, torch.cuda, torch.root) == ("2.11.0+cu130", "13.0", tmp_path / "torch")


def test_an_old_torch_is_refused(build, monkeypatch, tmp_path):
    fake_torch(tmp_path, "2.9.1", None)
    with pytest.raises(SystemExit, match=r"torch 2\.9\.1 is too old.*2\.10"):
        find_in(build, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("environment", "torch_cuda", "built"),
    [
        ({}, "13.0", True),
        ({}, None, False),
        ({"KNNEXT_CUDA": "0"}, "13.0", False),
        ({"KNNEXT_CUDA": "1"}, None, True),
        ({"FORCE_CUDA": "1"}, None, True),
        ({"FORCE_CUDA": "1", "KNNEXT_CUDA": "0"}, "13.0", False),
    ],
)
def test_when_the_cuda_library_is_built(
    build, monkeypatch, tmp_path, capsys, environment, torch_cuda, built
):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda")))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cuda = build.Cuda.find(build.Torch(tmp_path, "2.13.0", torch_cuda))
    assert (cuda is not None) == built
    if built:
        assert cuda.version == "13.0"
    else:
        assert "CPU package only" in capsys.readouterr().err


def test_asking_for_cuda_without_nvcc_says_so(build, monkeypatch, tmp_path):
    monkeypatch.setenv("KNNEXT_CUDA", "1")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match="no nvcc was found; set CUDA_HOME"):
        build.Cuda.find(build.Torch(tmp_path, "2.13.0", None))


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
@pytest.mark.parametrize(("torch_cuda", "wish"), [("13.0", None), ("13.0", "1"), (None, "1")])
def test_a_toolkit_without_nvcc_is_an_error(build, monkeypatch, tmp_path, name, torch_cuda, wish):
    if wish:
        monkeypatch.setenv("KNNEXT_CUDA", wish)
    other = fake_nvcc(tmp_path / "other")
    monkeypatch.setenv("PATH", f"{other / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(name, str(tmp_path / "empty"))
    with pytest.raises(SystemExit, match=f"{name}=.*empty holds no bin/nvcc"):
        build.Cuda.find(build.Torch(tmp_path, "2.13.0", torch_cuda))
    monkeypatch.setenv("KNNEXT_CUDA", "0")  # who wants no CUDA need not mend it
    assert build.Cuda.find(build.Torch(tmp_path, "2.13.0", torch_cuda)) is None


@pytest.mark.parametrize(
    ("environment", "driver", "built"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"KNNEXT_CUDA": "1"}, False, True),
        ({"FORCE_CUDA": "1"}, False, True),
        ({"TORCH_CUDA_ARCH_LIST": "9.0"}, False, True),
    ],
)
def test_without_a_driver_cuda_must_be_asked_for(
    build, monkeypatch, tmp_path, capsys, environment, driver, built
):
    nvcc = fake_nvcc(tmp_path / "cuda") / "bin"
    monkeypatch.setenv("PATH", f"{nvcc}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(build, "has_driver", lambda: driver)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cuda = build.Cuda.find(build.Torch(tmp_path, "2.13.0", "13.0"))
    assert (cuda is not None) == built
    if not built:
        assert "no NVIDIA driver is here (KNNEXT_CUDA=1 insists)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wish", "release", "label"),
    [
        (None, "13.0", ""),
        ("auto", "13.0", "+cu130"),
        ("auto", "12.8", "+cu128"),
        ("auto", None, "+cpu"),
        ("cu128", "12.8", "+cu128"),
        ("cpu", None, "+cpu"),
        ("mine.7", "13.0", "+mine.7"),
        ("cu129", "13.0", None),
        ("cpu", "13.0", None),
        ("cu130", None, None),
    ],
)
def test_the_label_of_a_wheel_is_of_its_compiler(
    build, monkeypatch, tmp_path, wish, release, label
):
    monkeypatch.setattr(build.Torch, "find", lambda: build.Torch(tmp_path, "2.13.0", "13.0"))
    monkeypatch.setenv("KNNEXT_CUDA", "1" if release else "0")
    if release:
        monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", release)))
    if label is None:
        with pytest.raises(SystemExit, match=f"KNNEXT_LOCAL_VERSION={wish}, but this build would"):
            build.local_version(wish)
    else:
        assert build.local_version(wish) == label


def test_a_wrong_switch_is_refused(build, monkeypatch, tmp_path):
    monkeypatch.setenv("KNNEXT_CUDA", "yes")
    with pytest.raises(SystemExit, match="KNNEXT_CUDA must be 0, 1 or unset, not 'yes'"):
        build.Cuda.find(build.Torch(tmp_path, "2.13.0", None))


def test_architectures(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 8.6;9.0a+PTX")
    cuda = build.Cuda.find(build.Torch(tmp_path, "2.13.0", "13.0"))
    assert cuda.archs == ["8.0", "8.6", "9.0a+PTX"]
    plain = cuda.gencode(Path("merge_topk.cu"))
    assert "arch=compute_86,code=sm_86" in plain
    assert "arch=compute_90a,code=sm_90a" in plain
    assert "arch=compute_90,code=compute_90" in plain  # PTX that a newer GPU can run
    hopper = cuda.gencode(Path("sm90/scan.cu"))
    assert hopper == "-gencode arch=compute_90a,code=sm_90a"


@pytest.mark.parametrize(
    ("wish", "chosen", "passed_over"),
    [
        ("7.5;8.0;8.6", ["8.0", "8.6"], ["7.5"]),
        ("5.2 6.0 6.1 7.0 7.5 8.0 8.6 9.0+PTX", ["8.0", "8.6", "9.0a+PTX"], ["5.2", "7.0", "7.5"]),
        (";8.0;;9.0a;", ["8.0", "9.0a"], []),
        ("8.0,9.0a,", ["8.0", "9.0a"], []),
        ("Ampere;Hopper", ["8.0", "8.6+PTX", "9.0a+PTX"], []),
        ("Turing;Ada", ["8.9+PTX"], ["7.5"]),
        ("Volta+PTX hopper+PTX", ["9.0a+PTX"], ["7.0+PTX"]),
        ("Blackwell", ["10.0", "12.0"], ["10.3", "12.1+PTX"]),  # this nvcc lacks two of them
        ("sm_80;compute_90", ["8.0", "9.0a"], []),
        ("8.0;20.0", ["8.0"], ["20.0"]),
        ("8.0;Rubin", ["8.0"], ["Rubin"]),
        ("9.0;9.0a", ["9.0a"], []),
    ],
)
def test_presets_of_other_packages_are_read(build, monkeypatch, capsys, wish, chosen, passed_over):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    known = {"80", "86", "89", "90", "100", "120"}
    assert build.choose_archs(known, visible=["8.6"]) == chosen
    said = capsys.readouterr().err
    for name in passed_over:
        assert f"not compiled for {name}: " in said
    assert said.count("not compiled") >= len(passed_over)


@pytest.mark.parametrize("wish", ["7.5", "Turing", "nonsense", "6.0;7.0+PTX"])
def test_an_arch_list_of_which_nothing_is_left_is_an_error(build, monkeypatch, wish):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    with pytest.raises(SystemExit, match="names nothing that can be built; wanted are"):
        build.choose_archs({"75", "80", "90"}, visible=["8.6"])


@pytest.mark.parametrize("wish", [None, "", ";", "native"])
def test_without_a_list_the_cards_decide(build, monkeypatch, wish):
    if wish is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    known = {"80", "86", "90", "100", "120"}
    assert build.choose_archs(known, ["8.6"]) == ["8.6"]
    assert build.choose_archs(known, ["7.5", "9.0"]) == ["9.0a"]
    assert build.choose_archs(known, []) == ["8.0", "9.0a", "10.0", "12.0+PTX"]
    assert build.choose_archs({"80", "86", "90"}, []) == ["8.0", "9.0a+PTX"]  # an older nvcc
    assert build.choose_archs(set(), []) == ["8.0", "9.0a", "10.0", "12.0+PTX"]


def test_cards_that_are_too_old_mean_the_cpu_package(build, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda")))
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 7.5\necho 7.5\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
    torch = build.Torch(tmp_path, "2.13.0", "13.0")
    assert build.Cuda.find(torch) is None
    assert "the cards here (7.5) are older than 8.0" in capsys.readouterr().err
    assert build.Cuda.find(torch, for_here=False) is not None  # a wheel, for other machines
    monkeypatch.setenv("KNNEXT_CUDA", "1")
    assert build.Cuda.find(torch) is not None
    smi.write_text("#!/bin/sh\necho 8.9\necho 9.0\necho 8.9\n")
    monkeypatch.delenv("KNNEXT_CUDA")
    assert build.Cuda.find(torch).archs == ["8.9", "9.0a"]


def test_no_compiler_is_said_in_one_sentence(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(
        SystemExit, match="no C\\+\\+ compiler: no-such-compiler -m64 was not found"
    ):
        build.check_compiler()


def test_build_info_names_this_build():
    from knnext._host import best_cpu_isa, build_info, cpu_isa, usable_cpu_isas

    info = build_info()
    assert info["version"].startswith("0.")
    assert info["torch_target"] == "2.10"
    intel = ["plain", "avx2", "avx2_vnni", "avx512", "avx512_vnni"]
    of_processor = {"x86_64": intel, "aarch64": ["plain", "neon"]}
    assert info["vector_paths"] == of_processor[platform.machine()]
    assert cpu_isa() in usable_cpu_isas() and set(usable_cpu_isas()) <= set(info["vector_paths"])
    forced = os.environ.get("KNNEXT_CPU_ISA")
    assert cpu_isa() == (forced or best_cpu_isa())


def test_what_was_compiled_is_what_is_tested(monkeypatch):
    """A checkout that nobody compiled, in front of an installed wheel, would test plain PyTorch."""
    from knnext.ops import REPORT
    from tests.conftest import without_compiled_ops

    monkeypatch.delenv("KNNEXT_TEST_FALLBACKS", raising=False)
    assert without_compiled_ops() == ""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "knnext._host", None)
        assert "_host" in without_compiled_ops()
    monkeypatch.setattr(REPORT, "cpu", "libknnext_cpu.so is missing")
    message = without_compiled_ops()
    assert "libknnext_cpu.so is missing" in message and "make build" in message
    monkeypatch.setenv("KNNEXT_TEST_FALLBACKS", "1")
    assert without_compiled_ops() == ""


def test_the_host_module_is_compiled_without_torch(build, monkeypatch, tmp_path):
    """torch's headers bring an older pybind11, which from torch 2.11 on refuses to be compiled with
    TORCH_TARGET_VERSION.
    """
    fake_torch(tmp_path, "2.11.0+cu130", "13.0")
    torch = find_in(build, monkeypatch, tmp_path)
    ninja = build.NinjaFile(torch, None, tmp_path / "build", tmp_path / "knnext")
    ninja.library(tmp_path / "libknnext_cpu.so", build.sources("cpu/isa.cpp"), "$torch_flags")
    build.add_host_module(ninja, torch, None, "1.0")
    text = "\n".join(ninja.lines)
    host = text.partition("host_module.cpp.o:")[2]
    rule = text.partition("rule cxx")[2].partition("\nrule ")[0]
    assert "flags" in host and "torch/include" in text
    assert "torch" not in rule, "what every object is given"
    assert "torch_flags" not in host and "torch/include" not in host


def test_another_cuda_in_the_same_folder_compiles_anew(build, monkeypatch, tmp_path):
    """ninja compares commands: /usr/local/cuda may be another toolkit than yesterday."""
    fake_torch(tmp_path, "2.13.0", None)
    torch = find_in(build, monkeypatch, tmp_path)
    commands = set()
    for version in ("12.8", "13.0"):
        cuda = build.Cuda("/usr/local/my cuda/bin/nvcc", version, ["9.0a"])
        lines = build.NinjaFile(torch, cuda, tmp_path / "build", tmp_path).lines
        commands.add(lines[lines.index("rule nvcc") + 1])
    assert len(commands) == 2
    assert all("'/usr/local/my cuda/bin/nvcc' " in command for command in commands)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_tree_may_lie_anywhere(build, monkeypatch, tmp_path):
    """Folders with what shells, ninja and compilers read in their own ways; all is compiled."""
    pytest.importorskip("ninja")
    tree = tmp_path / "a $tree (of mine)"
    fake_torch(tree / "packages", "2.13.0", None)
    torch = find_in(build, monkeypatch, tree / "packages")
    (tree / "csrc" / "in").mkdir(parents=True)
    (tree / "csrc" / "in" / "one.h").write_text("#define ONE 1\n")
    (tree / "csrc" / "in" / "one.cpp").write_text('#include "in/one.h"\nint one() { return ONE; }')
    (torch.root / "include").mkdir()
    (torch.root / "include" / "two.h").write_text("#define TWO 2\n")
    (tree / "csrc" / "two.cpp").write_text("#include <two.h>\nint two() { return TWO; }")
    monkeypatch.setattr(build, "CSRC", tree / "csrc")
    monkeypatch.setenv("KNNEXT_LINK_FLAGS", f"{shlex.quote(str(tree / 'first.o'))} -Xlinker -O1")
    (tree / "first.cpp").write_text("int first() { return 0; }")
    subprocess.run(["g++", "-c", "first.cpp", "-o", "first.o", "-fPIC"], cwd=tree, check=True)
    monkeypatch.delenv("CXX", raising=False)
    ninja = build.NinjaFile(torch, None, tree / "build", tree / "knnext")
    library = ninja.package / "lib" / "libknnext_cpu.so"
    include = f"-isystem {build.as_word(torch.includes[0])}"
    ninja.library(library, build.sources("**/*.cpp"), include)
    ninja.run()
    held = subprocess.run(["nm", "-C", library], capture_output=True, text=True).stdout
    assert "one()" in held and "two()" in held and "first()" in held
    # And a header that changed is seen, so the compiler's list of them was understood.
    before = library.stat().st_mtime_ns
    ninja.run()
    assert library.stat().st_mtime_ns == before
    (tree / "csrc" / "in" / "one.h").write_text("#define ONE 11\n")
    ninja.run()
    assert library.stat().st_mtime_ns > before
