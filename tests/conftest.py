"""Devices that must be there, and tests that do not get into each other's way.

Markers `gpu` and `multi_gpu`: skipped without the devices. KNNEXT_REQUIRE_GPU says how many there
must be: with 1, no test of one device is skipped, and with 2, none of two.

With ``-n N --dist loadgroup`` the tests of one file run in one worker, since they share what they
build; a test that must not share a worker's time with others names a group of its own. Which files
a worker runs, and in which order, is chance: a file that leaves the process other than it found it
fails in its last test.

The compiled ops must be those under test: a checkout beside an installed wheel would come first and
run plain PyTorch, and every test would pass. KNNEXT_TEST_FALLBACKS=1 tests that all the same.

Caches of libraries lie in one folder for the session and go with it: nothing is left in HOME.
"""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

NEEDED = {"gpu": 1, "multi_gpu": 2}
#: Folders whose tests share something dear, made once a worker: a laboratory.
ONE_GROUP = ("experiments",)
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT") or 1)


#: Where libraries keep things, by the variable that says so.
CACHES = {
    "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "XDG_CACHE_HOME": "cache",
}
_OWN = "KNNEXT_TEST_CACHES"
_FOUND: dict[str, object] = {}


def restore_signals() -> None:
    """What `nohup` or a shell's background has set to be ignored would be ignored by children."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})


def without_compiled_ops() -> str:
    """Why the knnext that is imported here would be tested without what was compiled, or ""."""
    import knnext
    from knnext.ops import REPORT

    needs_gpu = int(os.environ.get("KNNEXT_REQUIRE_GPU") or 0) > 0
    missing = REPORT.cpu or (REPORT.cuda if needs_gpu else "")
    try:
        importlib.import_module("knnext._host")
    except ImportError as error:
        missing = missing or str(error)
    if not missing or os.environ.get("KNNEXT_TEST_FALLBACKS") == "1":
        return ""
    return (
        f"the knnext in {Path(knnext.__file__).parent} runs without its compiled ops ({missing}): "
        "make build, or run the tests from a folder in which there is no knnext"
    )


def pytest_configure(config: pytest.Config) -> None:
    if reason := without_compiled_ops():
        raise pytest.UsageError(reason)
    restore_signals()
    if _OWN not in os.environ:  # else of the process that started this worker
        caches = os.environ[_OWN] = tempfile.mkdtemp(prefix="knnext-tests-")
        os.environ.update({name: f"{caches}/{folder}" for name, folder in CACHES.items()})
        config.add_cleanup(lambda: shutil.rmtree(caches, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop(_OWN, None))
    if _WORKERS > 1:  # torch's threads of several workers would wait for each other
        threads = max(1, (os.cpu_count() or 1) // _WORKERS)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of their children


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _WORKERS > 1 and item.get_closest_marker("xdist_group") is None:
            path = item.path
            shared = next((name for name in ONE_GROUP if path.parent.name == name), None)
            item.add_marker(pytest.mark.xdist_group(shared or f"{path.parent.name}/{path.stem}"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = max((n for name, n in NEEDED.items() if item.get_closest_marker(name)), default=0)
    found = torch.cuda.device_count()
    if found >= needed:
        return
    reason = f"needs {needed} CUDA device(s), found {found}"
    required = int(os.environ.get("KNNEXT_REQUIRE_GPU") or 0)
    if found < min(needed, required):
        pytest.fail(f"{reason}, and KNNEXT_REQUIRE_GPU={required}", pytrace=False)
    pytest.skip(reason)


def pytest_collection_finish() -> None:
    _FOUND.update(surroundings())


def surroundings() -> dict[str, object]:
    """What all tests of a process share and one may change for the others."""
    variables = {
        f"${name}": value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"
    }
    return {
        **variables,
        "the current folder": str(Path.cwd()),
        "torch's threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's gradients": torch.is_grad_enabled(),
        "SIGINT": signal.getsignal(signal.SIGINT),
        "the largest file": resource.getrlimit(resource.RLIMIT_FSIZE),
    }


def changed() -> dict[str, object]:
    """What is not as it was found. Variables that libraries and commands set where there were none
    harm nobody; ours would."""
    left = surroundings()
    names = {*_FOUND, *(name for name in left if name.startswith("$KNNEXT_"))}
    return {name: left.get(name) for name in names if left.get(name) != _FOUND.get(name)}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """After the last test of a file, and what its fixtures take back."""
    yield
    if nextitem is None or nextitem.path != item.path:
        left = changed()
        _FOUND.update(surroundings())  # the next file is not to blame
        assert not left, f"{item.path.name} leaves {left}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test draws the same numbers, alone or in the whole run."""
    torch.manual_seed(0)
