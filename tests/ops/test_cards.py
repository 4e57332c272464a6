"""Which cards the CUDA library may run on: a stand-in for the NVIDIA driver says what there is."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from knnext.ops import _cards
from knnext.ops._library import COMPOSED
from knnext.ops._schemas import GRADIENT_NAMES, NAMES
from tests.ops.mixing_cases import run_python

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")

# STAND_IN_DRIVER: such as 13000. STAND_IN_CARDS: capabilities, such as "80 75". Every call is
# written to STAND_IN_LOG.
DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static const char* env(const char* name) { const char* t = getenv(name); return t ? t : ""; }
static void note(const char* what) {
  FILE* f = fopen(env("STAND_IN_LOG"), "a");
  if (f) { fprintf(f, "%s\n", what); fclose(f); }
}
static int card(int which) {
  const char* text = env("STAND_IN_CARDS");
  for (char* end; ; text = end, which--) {
    int value = strtol(text, &end, 10);
    if (end == text) return 0;
    if (which == 0) return value;
  }
}
int cuInit(unsigned flags) { note("cuInit"); return *env("STAND_IN_BROKEN") ? 999 : 0; }
int cuDriverGetVersion(int* v) { note("version"); *v = atoi(env("STAND_IN_DRIVER")); return 0; }
int cuDeviceGetCount(int* n) { for (*n = 0; card(*n); ++*n) {} return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuDeviceGetName(char* name, int n, int d) { snprintf(name, n, "Card %d", d); return 0; }
int cuDeviceGetAttribute(int* v, int what, int d) {
  if (what != 75 && what != 76) return 1;
  *v = what == 75 ? card(d) / 10 : card(d) % 10;
  return 0;
}
int cuCtxCreate_v2(void** c, unsigned f, int d) { note("context"); return 1; }
"""
BUILT = "8.0;9.0a;10.0;12.0+PTX"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    command = ["gcc", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.fixture
def at_hand(driver: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Sets driver version and cards."""
    library = ctypes.CDLL(str(driver / "libcuda.so.1"))
    monkeypatch.setattr(_cards, "_libcuda", lambda: library)
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))

    def put(version: int, cards: str) -> None:
        monkeypatch.setenv("STAND_IN_DRIVER", str(version))
        monkeypatch.setenv("STAND_IN_CARDS", cards)

    return put


@pytest.mark.parametrize(
    ("card", "runs"),
    [
        *((c, True) for c in ("80", "86", "89", "90", "100", "103", "120", "121", "130")),
        *((c, False) for c in ("50", "61", "70", "75", "110")),
        *((c, True) for c in ("75 80", "90 70")),
        ("75 61", False),
    ],
)
def test_by_the_capability(at_hand, card: str, runs: bool) -> None:
    at_hand(13000, card)
    reason = _cards.can_run("13.0", BUILT)
    assert (reason == "") is runs, reason
    if not runs:
        assert f"Card 0 is sm_{card.split()[0]}" in reason
        wanted = "built for 8.0, 9.0a, 10.0, 12.0+PTX alone" if card == "110" else "need sm_80"
        assert wanted in reason


@pytest.mark.parametrize(
    ("version", "toolkit", "runs"),
    [
        (13000, "13.0", True),
        (13000, "13.1", True),
        (12080, "13.0", False),
        (12020, "12.8", True),
        (11080, "12.4", False),
        (13000, "12.4", True),
        (12040, "", True),
    ],
)
def test_by_the_driver(at_hand, version: int, toolkit: str, runs: bool) -> None:
    at_hand(version, "90")
    reason = _cards.can_run(toolkit, BUILT)
    assert (reason == "") is runs
    if not runs:
        assert f"driver is for CUDA {version // 1000}.{version % 1000 // 10}" in reason
        assert f"built with CUDA {toolkit}" in reason


@pytest.mark.parametrize(
    ("archs", "card", "version", "runs"),
    [
        ("8.0", "90", 13000, False),
        ("9.0a", "90", 13000, True),
        ("9.0a", "80", 13000, False),
        ("9.0a", "100", 13000, False),
        ("9.0a+PTX", "100", 13000, True),
        ("8.0+PTX", "90", 13000, True),
        ("8.0+PTX", "90", 12080, True),
        ("8.6", "80", 13000, False),
        ("10.0f", "103", 13000, True),
        ("12.0+PTX", "130", 13010, True),
        ("12.0+PTX", "130", 12010, False),
        ("", "90", 13000, True),
    ],
)
def test_by_what_was_built(at_hand, archs: str, card: str, version: int, runs: bool) -> None:
    at_hand(version, card)
    reason = _cards.can_run("12.8", archs)
    assert (reason == "") is runs, reason


def test_where_the_driver_says_nothing_torch_is_believed(at_hand, monkeypatch) -> None:
    at_hand(13000, "")
    assert _cards.can_run("13.0", BUILT) == "" and _cards.visible_cards() == []
    at_hand(13000, "75")
    monkeypatch.setenv("STAND_IN_BROKEN", "1")
    assert _cards.can_run("13.0", BUILT) == ""
    monkeypatch.setattr(_cards, "_libcuda", lambda: None)
    assert _cards.can_run("13.0", BUILT) == "" and _cards.cuda_driver_version() is None


def test_torch_for_rocm_gets_the_reference(at_hand, monkeypatch) -> None:
    at_hand(13000, "90")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "built for ROCm 6.4" in _cards.can_run("13.0", BUILT)


# A process that finds a card: torch is made to believe in one.
PROCESS = """
import json, os, sys, warnings
from pathlib import Path
import torch
asked = []
torch.cuda.is_available = lambda: asked.append(1) or True
torch.version.cuda = "13.0"
import knnext
from knnext.ops import REPORT, _library
log = Path(os.environ["STAND_IN_LOG"])
at_import = log.read_text() if log.exists() else ""
assert not asked and not at_import, (asked, at_import)
if os.fork() == 0:
    os._exit(len(asked))
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
_library.LIBRARIES = Path(sys.argv[1])
_library.built_for = lambda: ("13.0", "8.0;9.0a")
has = torch._C._dispatch_has_kernel_for_dispatch_key
assert not has("knnext::knn_softmax", "CUDA")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    calls = [call for call, _ in torch.cuda._queued_calls if call == REPORT.decide_cuda]
    assert len(calls) == 1
    calls[0]()
    quiet = len(caught)
    d, tokens = torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    op = torch.ops.knnext.knn_softmax.default
    results = []
    for _ in range(2):
        results += op._op_dk(torch._C.DispatchKey.CUDA, d, tokens, 1.0, 4).tolist()
print(json.dumps({
    "cuda": REPORT.cuda, "fallbacks": REPORT.fallbacks, "quiet": quiet, "results": results,
    "warnings": [str(w.message) for w in caught], "log": log.read_text().split(),
    "kernels": [n for n in sys.argv[2].split() if has("knnext::" + n, "CUDA")],
}))
"""


def process(driver: Path, folder: Path, cards: str, version: int) -> dict:
    (folder / "libknnext_cuda.so").touch()
    argv = [str(folder), " ".join(NAMES + GRADIENT_NAMES)]
    text = run_python(
        f"import sys; sys.argv = ['', *{argv!r}]\n" + PROCESS,
        LD_LIBRARY_PATH=str(driver),
        STAND_IN_LOG=str(folder / "log"),
        STAND_IN_CARDS=cards,
        STAND_IN_DRIVER=str(version),
    )
    return json.loads(text)


@pytest.mark.parametrize(
    ("cards", "version", "why"),
    [("75", 13000, "sm_75"), pytest.param("90", 12080, "CUDA", marks=pytest.mark.slow)],
)
def test_the_reference_stands_in_with_one_warning(
    driver: Path, tmp_path: Path, cards: str, version: int, why: str
) -> None:
    said = process(driver, tmp_path, cards, version)
    assert why in said["cuda"] and "did not load" not in said["cuda"], "it may not be loaded"
    assert said["fallbacks"] == [f"CUDA {name}" for name in NAMES if name not in COMPOSED]
    assert said["kernels"] == list(NAMES + GRADIENT_NAMES)
    assert said["quiet"] == 0, "who runs nothing there is told nothing"
    (warning,) = said["warnings"]
    assert "stands in on CUDA for all ops" in warning and said["cuda"] in warning
    assert said["results"] == [pytest.approx([1, 0, 0, 0])] * 4
    assert said["log"].count("cuInit") <= 1 and "context" not in said["log"]


def test_the_library_is_loaded_for_a_card_that_can(driver: Path, tmp_path: Path) -> None:
    said = process(driver, tmp_path, "80 75", 13000)
    assert "libknnext_cuda.so did not load" in said["cuda"], "it is an empty file here"
