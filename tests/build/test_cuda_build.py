"""The CUDA library on a machine without a GPU: it loads, it registers, and ptxas is content."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import knnext
from knnext.ops._library import COMPOSED
from knnext.ops._schemas import GRADIENT_NAMES, NAMES
from tests.build import ptxas

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "knnext/lib/libknnext_cuda.so"
pytestmark = pytest.mark.skipif(
    not LIBRARY.is_file(), reason="no CUDA library was built (KNNEXT_CUDA=1 builds one)"
)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_loads_beside_any_torch_and_registers_every_op() -> None:
    compiled = [name for name in NAMES + GRADIENT_NAMES if name not in COMPOSED]
    code = (
        "import torch\n"
        f"torch.ops.load_library({str(LIBRARY.with_name('libknnext_cpu.so'))!r})\n"
        f"torch.ops.load_library({str(LIBRARY)!r})\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"missing = [n for n in {compiled!r} if not has('knnext::' + n, 'CUDA')]\n"
        "assert not missing, missing\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_package_loads_it() -> None:
    done = _run(
        sys.executable, "-c", "from knnext.ops import REPORT; print(REPORT.cuda or 'loaded')"
    )
    assert done.strip() == "loaded"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can")
def test_failed_queries_are_told_or_refused() -> None:
    count = ctypes.CDLL(str(LIBRARY)).knnext_failed_queries
    count.argtypes, count.restype = [ctypes.c_int], ctypes.c_longlong
    assert count(0) == -1, "without a device there is no count, and no crash"
    with pytest.raises(RuntimeError, match="failed_queries: torch sees no CUDA device"):
        knnext.failed_queries()


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_needs_nothing_of_torch_but_its_c_interface() -> None:
    undefined = [line.split()[-1] for line in _run("nm", "-Du", str(LIBRARY)).splitlines()]
    # C++ symbols of torch, the CUDA runtime (linked statically) and the driver.
    foreign = re.compile(r"^(_ZN\d*K?(2at|3c10|5torch)|_ZNK(2at|3c10|5torch)|cuda[A-Z]|cu[A-Z]|Py)")
    assert [name for name in undefined if foreign.match(name)] == []
    needed = re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "-d", str(LIBRARY)))
    bad = [n for n in needed if re.search(r"cuda|torch_python|libpython", n)]
    assert bad == []


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs binutils")
def test_ptxas_uses_no_stack_and_spills_nothing() -> None:
    report = ptxas.read_report(ptxas.build_folder())
    assert report, "the build left no ptxas logs"
    for kernel, archs in report.items():
        for arch, facts in archs.items():
            assert facts["spills"] == 0, f"{kernel} on {arch} spills: {facts}"
            assert facts["stack"] == 0, f"{kernel} on {arch} has a stack: {facts}"


def test_ptxas_lets_warpgroup_products_run_on() -> None:
    # C7508: setmaxnreg is ignored; C7510 and others: "wgmma.mma_async instructions are serialized".
    logs = sorted(ptxas.build_folder().glob("*.cu.o.log"))
    said = [line for log in logs for line in log.read_text().splitlines() if "(C75" in line]
    assert logs and said == []


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs binutils")
def test_ptxas_says_what_the_table_says() -> None:
    table = json.loads(ptxas.TABLE.read_text())
    if ptxas.compiler_version() != table["nvcc"]:
        pytest.skip(f"the table is nvcc {table['nvcc']}'s; this is {ptxas.compiler_version()}")
    different = ptxas.differences(table["kernels"], ptxas.read_report(ptxas.build_folder()))
    assert not different, "\n".join(
        [*different, "python tests/build/ptxas.py --write renews the table"]
    )


def test_differences_names_what_changed() -> None:
    table = {"a": {"sm_80": {"registers": 1}}, "gone": {"sm_80": {"registers": 2}}}
    report = {"a": {"sm_80": {"registers": 9}}, "new": {"sm_80": {"registers": 3}}}
    lines = ptxas.differences(table, report)
    assert [line.split(" on ")[0] for line in lines] == ["a", "gone", "new"]
    table["only there"] = {"sm_90a": {"registers": 4}}  # for which nothing was built
    table["a"]["sm_90a"] = {"registers": 4}
    assert ptxas.differences(table, report) == lines
