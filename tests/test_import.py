"""What `import knnext` costs: torch and little else."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import knnext

CODE = """
import json, sys, time
import torch
start = time.process_time()
import knnext
took = time.process_time() - start
heavy = ["transformers", "faiss", "datasets", "matplotlib", "tokenizers", "pyarrow", "scipy"]
print(json.dumps({"seconds": took, "heavy": [m for m in heavy if m in sys.modules]}))
"""


@pytest.fixture(scope="module")
def imported() -> dict:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_nothing_heavy_is_imported(imported: dict) -> None:
    assert imported["heavy"] == []


def test_the_import_is_quick(imported: dict) -> None:
    assert imported["seconds"] < 1.0, "seconds of processor time beside torch's own import"


def test_every_public_name_is_there_and_listed() -> None:
    assert set(knnext.__all__) <= set(dir(knnext))
    for name in knnext.__all__:
        assert getattr(knnext, name) is not None, name
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = knnext.nonsense


def test_no_module_hides_a_public_name() -> None:
    for module in pkgutil.iter_modules(knnext.__path__):
        assert module.name not in knnext.__all__, "importing it would replace the function"
    for name in set(knnext.__all__) - {"DatastoreError"}:
        assert callable(getattr(knnext, name)), name


ASKS = """
import os, torch
def asked(*args):
    raise AssertionError("import knnext asks for CUDA")
for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_properties"):
    setattr(torch.cuda, name, asked)
torch.version.cuda = "13.0"  # what a CUDA build of torch says
import knnext
knnext.key_sqnorms(torch.ones(2, 3))
assert not [line for line in open("/proc/self/maps") if "libcuda.so" in line]
"""


def test_an_import_asks_nothing_of_cuda() -> None:
    done = subprocess.run([sys.executable, "-c", ASKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WORDS = """
import runpy, sys
sys.argv = {argv}
try:
    runpy.run_module("knnext", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert (stop.code or 0) == {code}, stop.code
assert "torch" not in sys.modules and "numpy" not in sys.modules
import knnext
assert callable(knnext.knn_search), "and who goes on all the same finds the ops"
import torch
assert torch.ops.knnext.knn_search
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--version"], 0), (["--help"], 0), (["build", "--help"], 0), (["eval", "-h"], 0), ([], 2)],
)
def test_help_and_version_load_no_torch(words: list[str], code: int) -> None:
    program = WORDS.format(argv=["knnext", *words], code=code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "knnext" in (done.stderr if code else done.stdout)
