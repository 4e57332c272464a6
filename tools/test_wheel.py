"""Installs a wheel in an empty environment, away from this tree, and looks whether it works there.

    python tools/test_wheel.py dist/knnext-0.1.0+cpu-cp312-*.whl --torch 2.13.0 --python python3.12

``--torch none``, for a Python that no torch is at hand for: what needs none is tried, the commands
that tell what there is and the plan of a search.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Short, of every layer: what was built, each op's way to its kernel, exceptions out of the ops.
TESTS = (
    "tests/build/test_build.py::test_build_info_names_this_build",
    "tests/ops/test_merge_topk.py",
    "tests/ops/test_knn_target_log_prob.py",
    "tests/ops/test_interrupts.py",
)
PLAN = """
import importlib.util, pathlib, sys, sysconfig
package = pathlib.Path(sysconfig.get_paths()["platlib"]) / "knnext"
(file,) = package.glob("_host*.so")
spec = importlib.util.spec_from_file_location("_host", file)
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
assert host.SearchPlan(queries=8, entries=100000, dim=64, k=16).kernel.startswith("cpu")
try:
    host.SearchPlan(queries=-1, entries=1, dim=1, k=1)
except ValueError as error:
    print(host.build_info(), error)
else:
    sys.exit("the plan took queries=-1")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", required=True, help="a version, or none")
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    if not args.wheel.is_file():
        sys.exit(f"{args.wheel} is no wheel")
    with tempfile.TemporaryDirectory(prefix="knnext-wheel-") as name:
        folder = Path(name)
        environment = folder / "environment"
        subprocess.run([args.python, "-m", "venv", str(environment)], check=True)
        check(environment / "bin", args.wheel.resolve(), args.torch, folder)
    print(f"{args.wheel.name}: works beside torch {args.torch}")


def check(binaries: Path, wheel: Path, torch: str, folder: Path) -> None:
    python, knnext = str(binaries / "python"), str(binaries / "knnext")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> None:
        print("+", " ".join(Path(word).name if os.sep in word else word for word in command[:4]))
        sys.stdout.flush()
        subprocess.run(command, cwd=folder, env=kept, check=True)

    if torch == "none":
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
        run(knnext, "--version")
        run(python, "-c", PLAN)
        return
    run(python, "-m", "pip", "install", "--quiet", f"torch=={torch}", f"{wheel}[test]")
    run(knnext, "--version")
    run(knnext, "doctor", "--check")
    for part in ("tests", "pyproject.toml"):
        source = ROOT / part
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, folder / part)
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS)


if __name__ == "__main__":
    main()
