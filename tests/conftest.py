"""Devices that must be there, and workers that do not get into each other's way.

Markers `gpu` and `multi_gpu`: skipped without the devices. KNNEXT_REQUIRE_GPU says how many there
must be: with 1, no test of one device is skipped, and with 2, none of two.

With ``-n N --dist loadgroup`` the tests of one file run in one worker, since they share what they
build; a test that must not share a worker's time with others names a group of its own.

Caches of libraries lie in one folder for the session and go with it: nothing is left in HOME.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile

import pytest
import torch

NEEDED = {"gpu": 1, "multi_gpu": 2}
#: Folders whose tests share something dear, made once a worker: a laboratory, the emulator's build.
ONE_GROUP = ("experiments", "emulator")
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT") or 1)


#: Where libraries keep things, by the variable that says so.
CACHES = {
    "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "XDG_CACHE_HOME": "cache",
}
_OWN = "KNNEXT_TEST_CACHES"


def restore_signals() -> None:
    """What `nohup` or a shell's background has set to be ignored would be ignored by children."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})


def pytest_configure(config: pytest.Config) -> None:
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


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test draws the same numbers, alone or in the whole run."""
    torch.manual_seed(0)
