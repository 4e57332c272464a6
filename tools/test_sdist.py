"""Makes the sdist, unpacks it, compiles the CPU ops from it and runs its tests there.

    python tools/test_sdist.py [--libraries FOLDER] [--out FOLDER]

All tests are collected, which is where a file that is not in the sdist shows, and some are run.
``--libraries`` takes what was compiled from that checkout instead of compiling it a second time;
the sources of the sdist are compared with those of the checkout either way.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Files of tests that are run, of all that are collected.
TESTS = ("test_rooms", "test_gather_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--libraries", type=Path, help="a checkout to take compiled libraries of")
    parser.add_argument("--out", type=Path, help="where to keep the sdist")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="knnext-sdist-") as name:
        sdist = make(Path(name))
        tree = unpack(sdist, Path(name))
        compare(tree)
        if args.libraries:
            borrow(args.libraries / "knnext", tree / "knnext")
        else:
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, env={**os.environ, "KNNEXT_CUDA": "0"}, check=True)
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        if subprocess.run([*pytest, "-k", " or ".join(TESTS)], cwd=tree).returncode:
            sys.exit("the tests of the sdist could not all be collected, or failed: see above")
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            shutil.copy2(sdist, args.out)


def make(folder: Path) -> Path:
    """An sdist of what git tracks, made in a copy: setuptools would also take what lies about."""
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, stdout=subprocess.DEVNULL)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (tree,) = (folder / "unpacked").iterdir()
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
    return tree


def compare(tree: Path) -> None:
    """Every source that is compiled must be in the sdist, as it is here."""
    listed = subprocess.run(
        ["git", "ls-files", "csrc", "knnext"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    missing = [n for n in names if not (tree / n).is_file()]
    differ = [n for n in names if n not in missing and not filecmp.cmp(ROOT / n, tree / n, False)]
    if missing or differ:
        sys.exit(f"the sdist lacks {missing}, and has other texts of {differ}")


def borrow(source: Path, package: Path) -> None:
    (package / "lib").mkdir(exist_ok=True)
    for file in [*source.glob("lib/*_cpu.so"), *source.glob("_host*.so")]:
        shutil.copy2(file, package / file.relative_to(source))


if __name__ == "__main__":
    main()
