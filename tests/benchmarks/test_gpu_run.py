"""benchmarks/gpu_run.sh without a GPU: the order of its steps, what each is given, what it leaves.

Stand-ins take the place of the compiler, the driver's tools and the interpreter, which notes how it
was called; the report alone is made by the real one. The clock is a file, so that how fast this
machine is changes nothing: it stands still unless a step hangs, and then its limit passes at once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.benchmarks.children import BENCHMARKS, ROOT, run_child
from tests.benchmarks.runs import entry, write_run

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

INTERPRETER = """#!/usr/bin/env bash
with="sm90=${KNNEXT_SM90:-} faiss=${FAISS_ACTIVATED:-} null=${NVCC_APPEND_FLAGS:-}"
echo "in=$PWD $with $*" >>"$STUB/log"
case "$*" in
  -) cat >/dev/null ;;
  *"import transformers"*) exit 1 ;;
  *"import xdist"*) [ -e "$STUB/xdist" ] ;;
  *setup.py*) [ ! -e "$STUB/broken-build" ] || { echo "error: no such header"; exit 7; } ;;
  *"-m benchmarks.report"*) exec "$REAL_PYTHON" "$@" ;;
  *bench_sm90*) cp "$STUB/sm90.json" "$(sed 's/.*--benchmark-json=//; s/ .*//' <<<"$*")" ;;
  *--benchmark-json=*)
    [ ! -e "$STUB/slow" ] || { touch "$STUB/started"; sleep 600; }
    cp "$STUB/portable.json" "$(sed 's/.*--benchmark-json=//; s/ .*//' <<<"$*")" ;;
  *"-m gpu"*) [ ! -e "$STUB/meeting" ] || meet; echo "3 passed" ;;
  *) echo "3 passed" ;;
esac
"""
# Goes on where another call is here too.
MEET = """meet() {
  mkdir "$STUB/first" 2>/dev/null || { touch "$STUB/second"; return; }
  for _ in $(seq 600); do [ ! -e "$STUB/second" ] || return; sleep 0.1; done
  exit 9
}
"""
SMI = """#!/usr/bin/env bash
case "$*" in *compute_cap*) echo 9.0 ;; *) echo "Stub GPU" ;; esac
"""
SANITIZER = """#!/usr/bin/env bash
while [[ $1 != "$PYTHON" ]]; do shift; done
exec "$@"
"""
# "hang": each step uses up its limit, and no time passes but the clock's.
# "expire": the limit of the step that says it has started is over then; the rest is the real one's.
TIMEOUT = """#!/usr/bin/env bash
limit=$3
if [ -e "$STUB/hang" ]; then
  echo $(($(cat "$STUB/clock") + limit)) >"$STUB/clock"
  exit 124
fi
watch() {
  while kill -0 $1 2>/dev/null; do
    [ ! -e "$STUB/started" ] || { rm "$STUB/started"; kill -ALRM $1; return; }
    sleep 0.05
  done
}
[ ! -e "$STUB/expire" ] || watch $$ &
exec "$REAL_TIMEOUT" "$@"
"""
DATE = """#!/usr/bin/env bash
[ "$*" != +%s ] || exec cat "$STUB/clock"
exec "$REAL_DATE" "$@"
"""
MIDNIGHT = 1_900_000_000


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    programs = {
        "nvidia-smi": SMI,
        "nvcc": "#!/bin/sh\n",
        "ncu": SANITIZER,
        "nproc": "#!/bin/sh\ncat $STUB/processors\n",
        "compute-sanitizer": SANITIZER,
        "timeout": TIMEOUT,
        "date": DATE,
        "python-stub": INTERPRETER.replace("echo", f"{MEET}echo", 1),
    }
    (tmp_path / "processors").write_text("2\n")
    (tmp_path / "clock").write_text(f"{MIDNIGHT}\n")
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    portable = [entry("bare_product", 4096, 10.0), entry("knnext_sqnorms", 4096, 20.0)]
    hopper = [entry("knnext_sqnorms", 4096, 11.0, kernels="sm90")]
    write_run(tmp_path / "portable.json", portable)
    write_run(tmp_path / "sm90.json", hopper)
    return tmp_path


def run(stub: Path, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What the script said, and how the interpreter was called."""
    environment = {
        "PATH": f"{stub}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(stub / "python-stub"),
        "REAL_PYTHON": sys.executable,
        "REAL_TIMEOUT": shutil.which("timeout") or "",
        "REAL_DATE": shutil.which("date") or "",
        "STUB": str(stub),
        "RIVALS": str(stub / "rivals"),
        "KNNEXT_SM90": "",
    }
    command = ["bash", str(BENCHMARKS / "gpu_run.sh"), str(stub / "out")]
    done = run_child(command, cwd=stub, scratch=stub / "own", env=environment | settings)
    return done, (stub / "log").read_text().splitlines()


def position(calls: list[str], *words: str) -> int:
    return next(i for i, call in enumerate(calls) if all(word in call for word in words))


def test_correctness_first_then_rivals_then_hopper_then_the_report(stub: Path) -> None:
    packed = stub / "packed"
    packed.mkdir()
    (packed / "activate.sh").write_text("export FAISS_ACTIVATED=1\n")
    (stub / "rivals").mkdir()
    with tarfile.open(stub / "rivals/faiss-gpu.tar.xz", "w:xz") as archive:
        archive.add(packed / "activate.sh", "activate.sh")
    done, calls = run(stub)
    assert done.returncode == 0, done.stdout + done.stderr
    order = [
        position(calls, "setup.py"),
        position(calls, "-m knnext doctor --check"),
        position(calls, "sm90= ", "-m gpu", "tests/gpu"),
        position(calls, "sm90=all", "-m gpu", "tests/gpu", "search or sm90"),
        position(calls, "test_short_list"),
        position(calls, "sm90= ", "benchmarks", "--budget"),
        position(calls, "sm90=1", "benchmarks", "--only=bare_product,knnext,knnext_sqnorms"),
        position(calls, "benchmarks.report"),
    ]
    assert order == sorted(order)
    checked = [call.split()[1] for call in calls if "test_short_list" in call]
    assert checked == [*["sm90="] * 3, "sm90=all"], "three tools, and one with Hopper's kernels"
    for call in calls:
        wanted = "faiss=1" if "benchmark-json" in call or "get_num_gpus" in call else "faiss= "
        assert wanted in call, "its libraries are for the benchmarks alone"
    summary = (stub / "out/summary.txt").read_text()
    assert "knnext on Stub GPU" in summary and "0 step(s) failed" in summary
    page = (stub / "out/README.md").read_text()
    assert "knnext_sqnorms (sm90)" in page and "### Targets" in page
    assert not any("timing.kernels" in call for call in calls), "that step is optional"


def test_an_archive_needs_no_xz_and_an_unpacked_folder_no_archive(stub: Path) -> None:
    (stub / "rivals").mkdir()
    (stub / "rivals/activate.sh").write_text("export FAISS_ACTIVATED=1\n")
    done, calls = run(stub, STEPS="bench")
    assert done.returncode == 0 and "faiss=1" in calls[position(calls, "--budget")]
    with tarfile.open(stub / "rivals/cuvs.tar.xz", "w:xz") as archive:
        archive.add(stub / "rivals/activate.sh", "activate.sh")
    (stub / "rivals/activate.sh").unlink()
    (stub / "tar").write_text("#!/bin/sh\nexit 2\n")
    (stub / "tar").chmod(0o755)
    text = (stub / "python-stub").read_text()
    unpack = '*"-m tarfile"*) exec "$REAL_PYTHON" "$@" ;;'
    (stub / "python-stub").write_text(text.replace('case "$*" in', f'case "$*" in {unpack}', 1))
    (stub / "log").unlink()
    done, calls = run(stub, STEPS="bench")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "faiss=1" in calls[position(calls, "--budget")]


def test_a_failing_step_is_told_and_stops_nothing(stub: Path) -> None:
    (stub / "broken-build").touch()
    done, calls = run(stub)
    assert done.returncode == 1
    summary = (stub / "out/summary.txt").read_text()
    assert "build          FAILED (7)" in summary and "error: no such header" in summary
    assert "1 step(s) failed" in summary and "no rivals in" in summary
    assert position(calls, "benchmarks.report")
    assert json.loads((stub / "out/bench.json").read_text())["benchmarks"]


def test_a_slow_step_is_cut_and_the_rest_runs(stub: Path) -> None:
    (stub / "slow").touch()
    (stub / "expire").touch()
    done, calls = run(stub)
    assert done.returncode == 1
    summary = (stub / "out/summary.txt").read_text()
    assert "bench          OUT OF TIME (200s)" in summary and "1 step(s) failed" in summary
    assert position(calls, "bench_sm90") < position(calls, "benchmarks.report")


@pytest.mark.parametrize("minutes", [9, 20])
def test_a_run_ends_in_time_though_every_step_hangs(stub: Path, minutes: int) -> None:
    """What is measured comes before what is checked a second time, and the report before none."""
    (stub / "hang").touch()
    done, _ = run(stub, MINUTES=str(minutes))
    assert done.returncode == 1
    assert int((stub / "clock").read_text()) - MIDNIGHT <= 60 * minutes
    given = dict(re.findall(r"^(\w+) +OUT OF TIME \((\d+)s\)", done.stdout, re.MULTILINE))
    assert {"machine", "build", "check", "tests", "bench", "bench_sm90", "report"} == set(given)
    assert int(given["bench"]) >= 15 * minutes and int(given["report"]) >= minutes
    assert "tests_sm90     NO TIME LEFT" in done.stdout


def test_the_build_without_epilogue_is_a_copy(stub: Path) -> None:
    done, calls = run(stub, NULL_EPILOGUE="1")
    assert done.returncode == 0, done.stdout
    builds = [call for call in calls if "setup.py" in call]
    assert ["null=-DKNNEXT_NULL_EPILOGUE" in call for call in builds] == [False, True]
    measured = [call.split()[0] for call in calls if "benchmarks.timing.kernels" in call]
    assert measured[0] == f"in={ROOT}" and len(set(measured)) == 2, "once here, once in the copy"
    assert not list((ROOT / "knnext").glob("**/*null*"))


def test_checks_run_beside_each_other_where_there_are_processors(stub: Path) -> None:
    (stub / "processors").write_text("16\n")
    (stub / "meeting").touch()
    (stub / "xdist").touch()
    done, calls = run(stub)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "-n 5 --dist worksteal" in calls[position(calls, "sm90= ", "-m gpu")]
    last_check = max(i for i, call in enumerate(calls) if "tests/gpu" in call)
    assert last_check < position(calls, "--budget"), "nothing disturbs what is timed"


def test_a_slow_check_in_the_background_is_interrupted(stub: Path) -> None:
    """SIGINT reaches it, though a shell's background ignores that signal."""
    (stub / "processors").write_text("16\n")
    (stub / "expire").touch()
    wait = "touch $STUB/started; for _ in $(seq 6000); do sleep 0.1; done"
    catch = f"trap 'echo 1 failed; exit 2' INT; {wait}"
    text = (stub / "python-stub").read_text()
    (stub / "python-stub").write_text(text.replace('*"-m gpu"*) ', f'*"-m gpu"*) {catch}; '))
    done, _ = run(stub, STEPS="tests")
    assert "tests          OUT OF TIME" in done.stdout and "1 failed" in done.stdout


def test_chosen_steps_run_alone(stub: Path) -> None:
    done, calls = run(stub, STEPS="build racecheck profile")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [call for call in calls if " -c " not in call]
    assert "setup.py" in steps[0] and "test_short_list" in steps[1] and len(steps) == 4
    assert all("--run-only" in call for call in steps[2:])
    refused, _ = run(stub, STEPS="build rececheck")
    assert refused.returncode == 2 and "STEPS names rececheck" in refused.stderr


def test_an_archive_holds_everything_and_few_files_lie_beside_it(stub: Path) -> None:
    done, _ = run(stub, ARCHIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    beside = {path.name for path in (stub / "out").iterdir()}
    wanted = {"results.tar.gz", "summary.txt", "README.md", "bench.json", "bench_sm90.json"}
    assert beside == wanted
    with tarfile.open(stub / "out/results.tar.gz") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    assert {"summary.txt", "tests.log", "memcheck.log", "bench.json", "report.log"} <= names
    # A later call for the report alone finds what an earlier one measured.
    (stub / "out/README.md").unlink()
    done, _ = run(stub, ARCHIVE="1", STEPS="report")
    assert done.returncode == 0 and (stub / "out/README.md").exists()
