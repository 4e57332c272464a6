"""What ptxas says of every CUDA kernel of the last build, and the table that it is held to.

python tests/build/ptxas.py            # the differences from tests/build/ptxas.json
python tests/build/ptxas.py --write    # renews the table: the diff is for the reviewer
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests/build/ptxas.json"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")

Report = dict[str, dict[str, dict[str, int]]]  # kernel -> architecture -> what it uses


def build_folder() -> Path:
    return ROOT / "build" / f"ninja-{sys.implementation.cache_tag}" / "libknnext_cuda"


def _short_names(mangled: list[str]) -> dict[str, str]:
    """``scan_kernel<__half, 2>`` instead of a name that holds a hash of the build."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    names = {}
    for raw, name in zip(mangled, done.stdout.splitlines(), strict=True):
        name = name.replace("(anonymous namespace)::", "").replace("knnext::", "")
        name = re.sub(r"\((?:bool|int|unsigned int)\)", "", name).removeprefix("void ")
        names[raw] = name.split("(")[0]
    return names


def read_report(folder: Path) -> Report:
    """Every kernel in the logs that the build leaves beside its objects."""
    entries: list[tuple[str, str, dict[str, int]]] = []
    for log in sorted(folder.glob("*.cu.o.log")):
        for line in log.read_text().splitlines():
            if found := ENTRY.search(line):
                entries.append((found[1], found[2], {}))
            elif found := FRAME.search(line):
                stack, stores, loads = map(int, found.groups())
                entries[-1][2].update(stack=stack, spills=stores + loads)
            elif found := USED.search(line):
                shared = SHARED.search(line)
                entries[-1][2].update(
                    registers=int(found[1]), shared=int(shared[1]) if shared else 0
                )
    names = _short_names([mangled for mangled, _, _ in entries])
    report: Report = {}
    for mangled, arch, facts in entries:
        report.setdefault(names[mangled], {})[arch] = facts
    return report


def compiler_version() -> str:
    """Of the nvcc that setup.py finds: registers are its choice, so the table holds for one."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [str(Path(home) / "bin/nvcc") for home in homes if home]
    found = [path for path in candidates if os.access(path, os.X_OK)]
    nvcc = found[0] if found else shutil.which("nvcc") or "nvcc"
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    return release[1] if release else "unknown"


def differences(table: dict[str, Any], report: Report) -> list[str]:
    """One line for each kernel that is not as the table says, on the architectures of the build."""
    lines = []
    built = {arch for archs in report.values() for arch in archs}
    for kernel in sorted(table.keys() | report.keys()):
        for arch in sorted(built & (table.get(kernel, {}).keys() | report.get(kernel, {}).keys())):
            told, found = table.get(kernel, {}).get(arch), report.get(kernel, {}).get(arch)
            if told != found:
                lines.append(f"{kernel} on {arch}: the table says {told}, ptxas says {found}")
    return lines


def main() -> None:
    report = read_report(build_folder())
    if "--write" in sys.argv:
        lines = [
            f"    {json.dumps(name)}: {json.dumps(report[name], sort_keys=True)}"
            for name in sorted(report)
        ]
        body = ",\n".join(lines)
        version = json.dumps(compiler_version())
        TABLE.write_text(f'{{\n  "nvcc": {version},\n  "kernels": {{\n{body}\n  }}\n}}\n')
        print(f"{len(report)} kernels written to {TABLE.name}")
    else:
        print("\n".join(differences(json.loads(TABLE.read_text())["kernels"], report)))


if __name__ == "__main__":
    main()
