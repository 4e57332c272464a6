"""A CUDA compiler from PyPI, for a machine without NVIDIA's toolkit: under build/cuda-13.0.

    python tools/cuda_toolchain.py 13.0

prints the folder to name by CUDA_HOME. The packages of CUDA 13 hold nvcc and what it calls; those
of CUDA 12 do not, and there is no way but NVIDIA's toolkit. What they hold is NVIDIA's, under its
own license.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The compiler calls the second and reads the third, and each must be of its own release; the
#: last two are the runtime that is linked in and headers that its headers include.
PACKAGES = (
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
    "nvidia-cuda-crt",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
)


def folder(cuda: str) -> Path:
    return ROOT / "build" / f"cuda-{cuda}"


def home(cuda: str) -> Path:
    """The toolkit within that folder, where the packages put it."""
    return folder(cuda) / "nvidia" / f"cu{cuda.partition('.')[0]}"


def pins(cuda: str) -> list[str]:
    return [f"{package}=={cuda}.*" for package in PACKAGES]


def main() -> None:
    cuda = sys.argv[1] if len(sys.argv) == 2 else ""
    if not re.fullmatch(r"\d+\.\d+", cuda) or int(cuda.partition(".")[0]) < 13:
        sys.exit(f"name a CUDA from 13.0 on, not {cuda!r}: PyPI has no nvcc of an older one")
    target = folder(cuda)
    shutil.rmtree(target, ignore_errors=True)
    print(f"CUDA {cuda}'s compiler from PyPI: about 80 MB, 270 MB unpacked", file=sys.stderr)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--target", str(target), *pins(cuda)], check=True)
    (home(cuda) / "lib64").symlink_to("lib")  # where nvcc looks
    nvcc = home(cuda) / "bin" / "nvcc"
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    if f"release {cuda}," not in text:
        sys.exit(f"{nvcc} is not of CUDA {cuda}, or does not run: {text.strip()!r}")
    print(home(cuda))


if __name__ == "__main__":
    main()
