"""benchmarks/report: the committed page, and a small made-up run on a GPU."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.data.search_shapes import SHAPES
from benchmarks.report.__main__ import main
from benchmarks.report.page import gather, render, write
from benchmarks.report.plots import LIMIT, _label, pictures, words
from benchmarks.report.rows import read, short_form
from benchmarks.report.tables import duration, number, size
from benchmarks.report.targets import names_shape, verdicts
from benchmarks.timing import kernels
from benchmarks.timing.kernels import short_name, summed
from tests.benchmarks.children import BENCHMARKS
from tests.benchmarks.runs import entry, write_run

COMMITTED = sorted((BENCHMARKS / "results").glob("*.json"))
PNG = b"\x89PNG"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rivals = {"torch_chunked": 60.0, "faiss_knn_gpu_float16": 90.0, "faiss_gpu_flat_float16": 75.0}
    entries = [
        entry("bare_product", 4096, 10.0, recall=None),
        entry("knnext", 4096, 25.0),
        entry("knnext_sqnorms", 4096, 20.0),
        entry("faiss_ivfpq", 4096, 2.0, recall=0.61),
        *(entry(name, 4096, ms) for name, ms in rivals.items()),
    ]
    for queries in (64, 256, 1024):
        entries += [entry("knnext", queries, 5.0), entry("torch_chunked", queries, 15.0)]
    return write_run(tmp_path / "portable.json", entries)


def test_the_committed_page_is_what_the_committed_runs_give() -> None:
    sources, rows = gather(COMMITTED)
    plots = sorted(f"results/{path.name}" for path in (BENCHMARKS / "results").glob("*.png"))
    assert plots == sorted(f"results/{picture.file_name}" for picture in pictures(rows))
    order = [f"results/{picture.file_name}" for picture in pictures(rows)]
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    again = "python -m benchmarks.report benchmarks/results/*.json"
    assert page == render(sources, rows, order), again


def test_cpu_rows_are_ratios_and_never_times(tmp_path: Path) -> None:
    path = BENCHMARKS / "results" / "cpu-2026-11-29.json"
    page, *drawn = write([path], tmp_path / "README.md", tmp_path)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\d (ms|µs|s) \|", text)
    faiss = next(line for line in text.splitlines() if "faiss_flat" in line)
    assert "| 3.83 |" in faiss, "taken in turns with knnext, at Q = 1"
    assert "Nothing has been measured on a GPU yet" in text
    assert drawn and all(path.read_bytes().startswith(PNG) for path in drawn)


def test_a_gpu_run_has_times_memory_recall_and_targets(run: Path, tmp_path: Path) -> None:
    page, *_ = write([run], tmp_path / "README.md", tmp_path)
    text = page.read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if "**knnext_sqnorms**" in line)
    assert all(cell in line for cell in ("| 0.80 |", "20.0 ms", "50 %", "1.0000", "123 MB"))
    approximate = next(line for line in text.splitlines() if "faiss_ivfpq" in line)
    assert "0.6100" in approximate and " T |" not in approximate, "it does not do that work"
    assert "Measured limits: reads 4,000 GB/s" in text and "A GPU, torch 9.9." in text
    assert "| at least 35 % of the bare product | portable | 1 | yes | 50.0 % |" in text
    assert "| at least 3x the speed of FAISS GPU flat | portable | 1 | yes | 3.75x |" in text
    assert "a-host" not in text


def turns(implementation: str, milliseconds: float, **facts: Any) -> dict[str, Any]:
    """A row on a CPU."""
    made = entry(implementation, 1, milliseconds, **facts)
    made["params"]["device"] = "cpu"
    return made | {"group": "knn_search Q1 cpu"}


def test_a_row_timed_in_turns_is_set_beside_those_turns(tmp_path: Path) -> None:
    """And not beside knnext's own row, of another minute of a loaded machine."""
    entries = [
        turns("knnext", 10.0),
        turns("svs_flat", 8.0, times_knnext=1.25),
        turns("usearch_i8", 5.0, times_knnext=0.75, recall=0.97, approximate=True),
        turns("torch_chunked", 30.0),
    ]
    run = write_run(tmp_path / "run.json", entries)
    page, *_ = write([run], tmp_path / "README.md", tmp_path)
    lines = [line for line in page.read_text().splitlines() if line.startswith("| Q = 1")]
    lines += [line for line in page.read_text().splitlines() if line.startswith("|  |")]
    cells = [[cell.strip() for cell in line.split("|")[2:4]] for line in lines]
    assert cells == [
        ["**knnext**", "1.00"],
        ["usearch_i8 (approximate)", "0.75"],
        ["svs_flat", "1.25"],
        ["torch_chunked", "3.00"],
    ]
    approximate = next(line for line in lines if "usearch_i8" in line)
    assert "0.9700" in approximate and " G |" not in approximate, "it does not do that work"


def test_pictures_hold_the_turns_too(tmp_path: Path) -> None:
    entries = []
    for queries in (1, 4, 16):
        ours, theirs = turns("knnext", 10.0), turns("svs_flat", 8.0, times_knnext=1.25)
        for made in (ours, theirs):
            made["extra_info"] |= {"Q": queries}
            entries.append(made | {"group": f"knn_search Q{queries} cpu"})
    _, rows = gather([write_run(tmp_path / "run.json", entries)])
    (picture,) = pictures(rows)
    lines = {line.name: line.y for line in picture.lines}
    assert lines["svs_flat"] == [1.25] * 3 and lines["knnext"] == [1.0] * 3


def test_the_approximate_are_no_rivals_of_an_exact_search(tmp_path: Path) -> None:
    entries = [
        entry("knnext_sqnorms", 4096, 10.0),
        entry("torch_chunked", 4096, 30.0),
        entry("faiss_sq8", 4096, 1.0, recall=0.9, approximate=True),
        entry("faiss_ivfpq", 4096, 1.0, recall=0.6),  # of before rows said so themselves
    ]
    _, rows = gather([write_run(tmp_path / "run.json", entries)])
    found = {v.target.what: v.value for v in verdicts(rows)}
    assert found["the speed of the fastest flat rival"] == pytest.approx(3.0)


def test_targets_are_missed_where_they_are_missed(tmp_path: Path) -> None:
    entries = [
        entry("bare_product", 4096, 10.0),
        entry("knnext_sqnorms", 4096, 11.6, kernels="sm90"),
        entry("torch_chunked", 4096, 30.0),
        entry("cuvs_brute_force", 4096, 35.0),
        entry("faiss_gpu_flat_float16", 4096, 50.0),
        entry("faiss_knn_gpu_float16", 4096, 90.0),
    ]
    _, rows = gather([write_run(tmp_path / "run.json", entries)])
    found = {(v.target.what, v.target.kernels): v for v in verdicts(rows)}
    assert {kernels for _, kernels in found} == {"hopper"}
    values = {what: (round(v.value, 2), v.met) for (what, _), v in found.items()}
    assert values == {
        "the bare product's time": (1.16, False),
        "the speed of FAISS GPU flat": (4.31, False),
        "the speed of cuVS": (3.02, True),
        "the speed of chunked torch": (2.59, False),
        "the speed of the fastest flat rival": (2.59, True),
    }


def test_both_kernels_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    again = [
        entry("bare_product", 4096, 11.0, kernels="sm90"),
        entry("knnext_sqnorms", 4096, 12.0, kernels="sm90"),
    ]
    second = write_run(tmp_path / "sm90.json", again)
    _, rows = gather([run, second])
    times = {row.implementation: row.seconds for row in rows if row["Q"] == 4096}
    assert times["knnext_sqnorms"] == 0.020 and times["knnext_sqnorms (sm90)"] == 0.012
    assert times["bare_product"] == 0.010, "of two rows of one name the first file's counts"


def test_pictures_hold_every_rival_and_the_limit(run: Path) -> None:
    _, rows = gather([run])
    (picture,) = pictures(rows)
    lines = {line.name: line for line in picture.lines}
    assert picture.axis == "Q" and picture.device == "cuda"
    assert {"knnext", "torch_chunked", "faiss_ivfpq (approximate)", LIMIT} <= set(lines)
    assert lines["knnext"].x == [64, 256, 1024, 4096] and lines["knnext"].y[-1] == 25.0
    assert lines[LIMIT].y == pytest.approx([1.0] * 4), "milliseconds, from any row's share"


def test_a_limit_that_a_kernel_may_beat_says_what_it_is() -> None:
    _, rows = gather(COMMITTED)
    (picture,) = pictures(rows)
    (limit,) = (line for line in picture.lines if line.name == LIMIT)
    assert picture.device == "cpu" and min(limit.y) < 1 < max(limit.y)
    assert "torch's product in float32" in _label(picture, limit)


def test_legends_say_words_and_no_two_names_the_same() -> None:
    files = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))
    assert len(files) == 7
    for file in files:
        names = import_module(f"benchmarks.{file}").IMPLEMENTATIONS
        said = {words(name) for name in names}
        assert len(said) == len(names) and not any("_" in text for text in said)
    assert words("knnext_sqnorms (sm90)") == "knnext, norms given (Hopper kernels)"


def test_the_short_form_gives_the_same_rows_and_no_host(run: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.json"
    short.write_text(json.dumps(short_form(run, "pytest benchmarks")))
    assert "a-host" not in short.read_text()
    source, rows = read(short)
    assert source.machine["gpu"] == "A GPU" and source.date == "2031-02-03"
    for ours, theirs in zip(rows, read(run)[1], strict=True):
        assert (ours.group, ours.implementation) == (theirs.group, theirs.implementation)
        assert ours.seconds == pytest.approx(theirs.seconds, rel=1e-3)
        assert ours["share_of_gemm"] == pytest.approx(theirs["share_of_gemm"], rel=1e-3)


def test_what_is_no_benchmark_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"results": []}')
    with pytest.raises(SystemExit) as stopped:
        main([str(path), "--page", str(tmp_path / "page.md")])
    assert stopped.value.code == 2
    assert "other.json is no benchmark JSON" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_shapes_that_targets_name_are_known() -> None:
    """They are timed first; targets of any shape name none."""
    named = [s for s in SHAPES["cuda"] if names_shape("knn_search", s)]
    assert {(s.queries, s.entries) for s in named} == {
        *((q, 10_000_000) for q in (1, 16, 64)),
        (4096, 1_000_000),
    }
    assert not any(names_shape("merge_topk", s) for s in SHAPES["cuda"])


def test_numbers_read_well() -> None:
    assert [number(x) for x in (0.00123, 0.0456, 0.789, 3.14159, 42.05, 1234.5)] == [
        *("0.0012", "0.046", "0.79", "3.14", "42.0", "1,234"),
    ]
    assert [duration(x) for x in (2.5, 0.0123, 4.5e-6)] == ["2.50 s", "12.3 ms", "4.50 µs"]
    assert [size(x) for x in (2.5e9, 3.0e6, 4000)] == ["2.50 GB", "3.00 MB", "4 kB"]


def test_kernel_times_are_of_one_search_and_named_shortly() -> None:
    scan = "void knnext::(anonymous namespace)::scan<__half, 128, 256>(knnext::ScanParams)"
    assert short_name(scan) == "scan<__half, 128, 256>"
    events = [
        SimpleNamespace(key="void knnext::select(Params)", count=3, device_time_total=30.0),
        SimpleNamespace(key=scan, count=6, device_time_total=900.0),
        SimpleNamespace(key="cudaLaunchKernel", count=9, device_time_total=0),
    ]
    found = [(t["kernel"], t["launches"], t["microseconds"]) for t in summed(events, calls=3)]
    assert found == [("scan<__half, 128, 256>", 2, 300.0), ("select", 1, 10.0)]


def test_a_run_is_kept_in_short_and_reported_from_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.report.page.HERE", tmp_path)
    (tmp_path / "results").mkdir()
    page = tmp_path / "page.md"
    places = ["--page", str(page), "--pictures", str(tmp_path / "pictures")]
    main([str(run), "--store", "kept", "--command", "as typed", *places])
    kept = json.loads((tmp_path / "results/kept.json").read_text())
    assert kept["command"] == "as typed" and "`kept.json` (2031-02-03)" in page.read_text()
    printed = capsys.readouterr().out.split()
    assert printed == [str(page), *map(str, (tmp_path / "pictures").iterdir())]


def test_kernel_times_want_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels"])
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        kernels.main()
