"""Shared by the benchmarks: group = op and shape, implementation = parameter, so that peers stand
on adjacent lines.

    make bench                                  # the shapes that matter most, on what is there
    pytest benchmarks --full                    # every shape
    pytest benchmarks --benchmark-disable       # small shapes, run and checked, not timed
    pytest benchmarks -k 'knn_search and cpu' --benchmark-json=benchmarks/out/cpu.json
    python -m benchmarks.report benchmarks/out/cpu.json

Real keys come from `benchmarks/data/real_keys.py` or from any datastore (--datastore), those of
D = 576 from `benchmarks/data/smollm2.py` (--real-keys-smollm2). Each result is checked once before
it is timed; a rival that is not installed is skipped, and says so.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.data import real_keys, smollm2
from benchmarks.data.cases import available_devices, cases
from benchmarks.report.targets import names_shape
from benchmarks.timing.budget import Budget
from benchmarks.timing.gpu import gpu_clock
from benchmarks.timing.measure import Measure, kernels, versions

_BUDGET = pytest.StashKey[Budget]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("knnext")
    group.addoption("--full", action="store_true", help="also the shapes that take long")
    group.addoption("--datastore", type=Path, help="a datastore's folder, for real keys")
    group.addoption(
        "--real-keys-smollm2",
        type=Path,
        metavar="FOLDER",
        help=f"where real keys of D = 576 lie, if not at {smollm2.FOLDER}",
    )
    group.addoption("--only", default="", help="implementations to run, by name, with commas")
    group.addoption("--budget", type=float, help="seconds after which further rivals are left out")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BUDGET] = Budget(config.getoption("--budget"))
    folder = config.getoption("--datastore")
    if folder is not None:
        real_keys.use(folder)
    folder = config.getoption("--real-keys-smollm2")
    if folder is not None:
        smollm2.use(folder)
    if torch.cuda.is_available():
        # Not the default stream: libraries take its handle, zero, for "none given".
        torch.cuda.set_stream(torch.cuda.Stream())
    elif int(os.environ.get("KNNEXT_REQUIRE_GPU") or 0) > 0:
        raise pytest.UsageError("KNNEXT_REQUIRE_GPU is set, and torch sees no CUDA device")


def pytest_report_header() -> str:
    names = " and ".join(available_devices())
    missing = "" if torch.cuda.is_available() else " (no CUDA device: its shapes are left out)"
    return f"benchmarks on {names}{missing}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" not in metafunc.fixturenames:
        return
    config, module = metafunc.config, metafunc.module
    chosen = list(
        cases(
            module.SHAPES,
            module.IMPLEMENTATIONS,
            full=config.getoption("--full"),
            smoke=config.getoption("benchmark_disable"),
            only=[name for name in config.getoption("--only").split(",") if name],
        )
    )
    ids = [f"{device}-{shape}-{name}" for shape, device, name in chosen]
    metafunc.parametrize("shape, device, implementation", chosen, ids=ids)


def _urgency(item: pytest.Item) -> tuple[bool, ...]:
    """Ascending: a run that is cut short has what the targets ask for, the search first."""
    op = Path(str(item.path)).stem.removeprefix("bench_")
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if params.get("device") != "cuda" or "implementation" not in params:
        return False, False, op != "knn_search"
    late = item.module.IMPLEMENTATIONS[params["implementation"]].late  # type: ignore[attr-defined]
    return late, not names_shape(op, params["shape"]), op != "knn_search"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_urgency)
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("device") == "cuda":
            item.add_marker(pytest.mark.benchmark(timer=gpu_clock, disable_gc=True))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)  # says nothing about speed
    machine_info.update(versions=versions(), threads=torch.get_num_threads())
    if torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        machine_info.update(gpu=torch.cuda.get_device_name(), gpu_memory=total, kernels=kernels())


@pytest.fixture(autouse=True)
def _within_budget(request: pytest.FixtureRequest) -> None:
    budget = request.config.stash[_BUDGET]
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "implementation" in params and budget.leaves_out(params["implementation"]):
        spent = f"the budget of {budget.seconds:g} s is spent"
        pytest.skip(f"{spent}; only knnext and the limits still run")


@pytest.fixture
def measure(benchmark: Any, device: str) -> Iterator[Measure]:
    yield Measure(benchmark, device)
    if device == "cuda":
        gc.collect()  # an index that waits in a cycle holds gigabytes
