"""How the benchmarks time a GPU: rotation, rounds, and a clock that only the device moves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.data.buffers import rotations
from benchmarks.report.tables import OPS as REPORTED
from benchmarks.timing.budget import Budget
from benchmarks.timing.gpu import (
    MAX_CALLS,
    ROUND_SECONDS,
    GpuSampler,
    calls_per_round,
    gpu_clock,
    rounds_for,
)
from benchmarks.timing.turns import Turns, settle
from knnext import Datastore
from tests.benchmarks.children import ROOT, run_child

L2 = 50 << 20
OPS = set(REPORTED)


class Device:
    """A device that takes `seconds` for each call that it is given; events read its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.calls, self.capturing = seconds, 0.0, 0, False
        self.stream = "the benchmarks' own"

    def call(self) -> None:
        self.calls += 1
        self.now += 0.0 if self.capturing else self.seconds

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self) -> None:
                device.now += self.held * device.seconds

        @contextmanager
        def graph(target: Any) -> Iterator[None]:
            before, device.capturing = device.calls, True
            own, device.stream = device.stream, "the capture's"
            yield  # as torch does it, the stream goes back only where nothing failed
            device.stream = own
            target.held, device.capturing = device.calls - before, False

        for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": graph}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: device.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda s: setattr(device, "stream", s))
        monkeypatch.setattr("benchmarks.timing.gpu.spin_up", lambda: None)


def test_buffers_rotate_past_twice_the_cache() -> None:
    for size in (1000, 1 << 20, 60 << 20, 5 << 30):
        sets = rotations(size, L2, most=1 << 20)
        assert sets * size >= 2 * L2
        assert (sets - 1) * size < 2 * L2
    assert rotations(0.0, L2) == 1024, "a bound holds where a call moves next to nothing"


@pytest.mark.parametrize("seconds", [1e-6, 1e-4, 5e-3, 3.0])
@pytest.mark.parametrize("sets", [1, 7, 750])
def test_a_round_is_whole_turns_of_the_buffers(seconds: float, sets: int) -> None:
    calls = calls_per_round(seconds, sets)
    assert calls % sets == 0 and sets <= calls <= max(sets, MAX_CALLS)
    assert calls * seconds >= ROUND_SECONDS or calls + sets > MAX_CALLS


def test_rounds_shrink_with_their_length() -> None:
    counts = [rounds_for(seconds) for seconds in (1e-5, 2e-3, 2e-2, 0.3, 1.5)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 50 and counts[-1] == 2


@pytest.mark.parametrize(
    "seconds, capturable, timing",
    [(5e-5, True, "graph"), (5e-5, False, "events"), (4e-3, True, "events"), (2.0, True, "events")],
)
def test_clock_moves_by_one_call_a_round(
    monkeypatch: pytest.MonkeyPatch, seconds: float, capturable: bool, timing: str
) -> None:
    device = Device(seconds)
    device.install(monkeypatch)
    sampler = GpuSampler([device.call] * 3, capturable).prepare()
    assert sampler.timing == timing
    before = gpu_clock()
    sampler.round()
    assert gpu_clock() - before == pytest.approx(seconds, rel=1e-6)
    assert sampler.seconds() == pytest.approx(seconds, rel=1e-6)


def test_a_call_that_cannot_be_captured_is_timed_by_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(5e-5)
    device.install(monkeypatch)

    def run() -> None:
        if device.capturing:
            device.capturing = False
            raise RuntimeError("operation not permitted when stream is capturing")
        device.call()

    with pytest.warns(UserWarning, match="no graph: operation not permitted"):
        sampler = GpuSampler([run], capturable=True).prepare()
    assert sampler.timing == "events" and device.stream == "the benchmarks' own"


def test_sets_of_buffers_take_turns_and_results_live_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(1e-3)
    device.install(monkeypatch)
    seen: list[int] = []

    def run(number: int) -> Any:
        def call() -> int:
            device.call()
            seen.append(number)
            return number

        return call

    sampler = GpuSampler([run(i) for i in range(4)]).prepare()
    seen.clear()
    sampler.round()
    assert len(seen) == sampler.calls and set(seen) == set(range(4))
    assert all((b - a) % 4 == 1 for a, b in pairwise(seen))
    assert sorted(sampler._results) == [0, 1, 2, 3]


class Clock:
    """Time that only moves by what is run and slept; after a call its threads spin for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spin: float = 0.0) -> None:
        self.now, self.worked, self.left, self.spin = 0.0, 0.0, 0.0, spin
        self.events: list[str] = []
        monkeypatch.setattr("benchmarks.timing.turns.time", self)

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.worked

    def sleep(self, seconds: float) -> None:
        spun = min(seconds, self.left)
        self.now, self.worked, self.left = self.now + seconds, self.worked + spun, self.left - spun
        self.events.append("pause")

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        times = list(seconds)

        def run() -> None:
            assert self.left == 0.0, "threads of the call before still spin"
            self.now += times.pop(0)
            self.left = self.spin
            self.events.append(name)

        return run


def test_two_calls_take_turns_with_pauses_between(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    turns, theirs = Turns(clock.call("ours", 1.0, 2.0, 4.0)), clock.call("theirs", 3.0, 5.0, 16.0)
    times = []
    for _ in range(3):
        turns()
        start = clock.now
        theirs()
        times.append(clock.now - start)
    assert clock.events == ["pause", "ours", "pause", "theirs"] * 3
    assert turns.ratio(times) == pytest.approx(3.0), "the median of 3, 2.5 and 4"


@pytest.mark.parametrize("spin", [0.004, 0.035, 0.15])
def test_a_turn_waits_for_threads_that_spin(spin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, spin)
    turns, theirs = Turns(clock.call("ours", 1.0, 1.0)), clock.call("theirs", 3.0, 3.0)
    for _ in range(2):
        turns()
        theirs()
    assert turns.seconds == pytest.approx([1.0, 1.0])
    clock.left = 60.0
    settle()
    assert clock.left > 50, "what works on for ever is not waited for"


@pytest.mark.parametrize(
    "ours, theirs, rounds",
    [(1e-3, 1e-3, 11), (0.1, 0.1, 8), (0.001, 0.5, 5), (0.5, 0.001, 5), (40.0, 40.0, 5)],
)
def test_short_calls_have_more_turns(
    ours: float, theirs: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    turns = Turns(clock.call("ours", ours))
    assert turns.rounds(clock.call("theirs", theirs), 5) == rounds
    assert turns.seconds == [], "a warm-up is no turn"


@pytest.mark.slow
def test_a_search_is_timed_in_turns_with_ours(tmp_path: Path) -> None:
    """With the suite's own fixtures, on its smallest shape."""
    target = tmp_path / "bench.json"
    names = "knnext,torch_chunked,usearch_i8,faiss_sq8"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("-p", "tests.benchmarks.smallest", "benchmarks/bench_knn_search.py"),
        *(f"--only={names}", f"--benchmark-json={target}"),
    ]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = run_child(command, cwd=ROOT, scratch=tmp_path / "own", env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    entries = json.loads(target.read_text())["benchmarks"]
    rows = {entry["params"]["implementation"]: entry["extra_info"] for entry in entries}
    assert {"knnext", "torch_chunked"} <= set(rows) <= set(names.split(","))
    assert "times_knnext" not in rows["knnext"]
    for name in set(rows) - {"knnext"}:
        assert rows[name]["times_knnext"] > 0 and rows[name]["threads"] == 1
        assert rows[name].get("approximate", False) == (name != "torch_chunked")


def test_only_knnext_and_the_limits_run_once_the_budget_is_spent() -> None:
    now = [100.0]
    budget, endless = Budget(30.0, lambda: now[0]), Budget(None, lambda: now[0])
    names = ("knnext", "knnext_sqnorms", "bare_product", "torch_chunked", "faiss_flat")
    now[0] = 130.0
    assert not any(map(budget.leaves_out, names)), "not before it is spent"
    now[0] = 130.1
    assert [budget.leaves_out(name) for name in names] == [False, False, False, True, True]
    assert not any(map(endless.leaves_out, names))


def small_datastore(path: Path) -> Path:
    """As wide as the real keys of the smoke list, and enough of them."""
    with Datastore.create(path, 128, torch.float16) as store:
        store.append(torch.randn(6000, 128), torch.zeros(6000, dtype=torch.int64))
    return path


@pytest.mark.slow
def test_every_cuda_branch_on_a_pretended_gpu(tmp_path: Path) -> None:
    """All rivals run, are checked, and what pytest-benchmark holds is the events' time."""
    pytest.importorskip("faiss")
    target = tmp_path / "bench.json"
    plugins = ("-p", "tests.benchmarks.pretended_cuda", "-p", "no:cacheprovider")
    command = [
        *(sys.executable, "-m", "pytest", "-q", *plugins, "benchmarks"),
        *("-k", "cuda and not ivfpq", f"--benchmark-json={target}"),
        f"--datastore={small_datastore(tmp_path / 'store')}",
    ]
    # One thread: the shapes are tiny, and threads that wait for each other are slow under load.
    environment = {"PYTHONPATH": str(ROOT), "KNNEXT_SM90": "1", "OMP_NUM_THREADS": "1"}
    done = run_child(command, cwd=ROOT, scratch=tmp_path / "own", env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-4000:]
    entries = json.loads(target.read_text())["benchmarks"]
    for entry in entries:
        facts = entry["extra_info"]
        assert entry["stats"]["median"] == pytest.approx(0.5e-3 / facts["calls"])
        assert facts["kernels"] == "sm90" and facts["device_name"] == "a pretended GPU"
        assert facts["calls"] % facts["rotations"] == 0
        assert {"bytes", "flop", "gbps", "tflops", "share_of_limit", "peak_memory"} <= set(facts)
        assert {"share_of_read", "share_of_copy", "versions", "timing"} <= set(facts)
    assert {entry["extra_info"]["op"] for entry in entries} == OPS
    assert any(entry["extra_info"]["rotations"] > 1 for entry in entries)
    assert {e["extra_info"].get("keys") for e in entries} >= {"gaussian", "lm"}
    search = {e["params"]["implementation"]: e for e in entries if "knn_search" in e["group"]}
    assert {"bare_product", "knnext_sqnorms", "torch_chunked", "torch_compiled"} <= set(search)
    assert {"cuvs_brute_force", "faiss_gpu_flat_float16", "faiss_knn_gpu_bfloat16"} <= set(search)
    assert search["knnext"]["extra_info"]["timing"] == "graph"
    assert search["knnext"]["extra_info"]["recall"] == 1.0
    assert search["cuvs_brute_force"]["extra_info"]["timing"] == "events"
    assert search["faiss_gpu_flat_float16"]["extra_info"]["peak_memory_by"] == "device"
    assert all("share_of_gemm" in entry["extra_info"] for entry in search.values())
