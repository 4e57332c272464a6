"""The doctor: every fact it prints is one that the process can confirm."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from knnext import reference
from knnext.cli import check, main
from knnext.cli.doctor import Search, doctor, render
from knnext.ops import REPORT, _gradients
from knnext.ops._schemas import GRADIENT_NAMES, NAMES


def test_facts_are_plain_values():
    facts = doctor(Search(queries=8, entries=1000, dim=64, k=16))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"]["version"] == torch.__version__
    assert facts["loaded"]["fallbacks"] == REPORT.fallbacks
    assert len(facts["gpus"]) == torch.cuda.device_count()


def test_the_text_says_what_runs():
    text = render(doctor(Search(queries=1024, entries=1_000_000, dim=1024, k=1024)))
    from knnext._host import cpu_isa

    assert f"path {cpu_isa()}" in text
    assert "1,024 queries x 1,000,000 entries, dim 1,024, k 1,024, float16" in text
    assert "cpu: cpu" in text
    assert "2.1 Tflop" in text  # 2 * 1024 * 10^6 * 1024


def test_the_plan_counts_bytes_and_flop():
    plan = doctor(Search(queries=4, entries=1000, dim=10, k=5))["plans"][0]
    assert plan["device"] == "cpu"
    assert plan["flop"] == 2 * 4 * 1000 * 10
    assert plan["bytes_read"] == plan["passes"] * 1000 * 10 * 2


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32"):
        doctor(Search(dtype="int8"))


def test_missing_faiss_is_said(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in doctor()["faiss"]["text"]


def test_a_gpu_without_a_cuda_build_gets_advice():
    from knnext.cli.doctor import _advice

    facts = doctor()
    facts["gpus"] = [{"name": "a GPU"}]
    facts["knnext"] = {"version": "0.1.0", "cuda_version": ""}
    assert any("KNNEXT_CUDA=1" in text for text in _advice(facts))


def test_the_choice_of_kernel_is_said_with_its_reason():
    facts = doctor(Search(queries=8, entries=1_000_000, dim=64, k=16))
    on_gpu = facts["plans"][1:]  # or what an H200 would do
    assert on_gpu
    for plan in on_gpu:
        assert plan["because"]
        assert f"choice: {plan['because']}" in render(facts)


# --check

CPU = torch.device("cpu")


def run_checks(only: str = "") -> list[dict[str, Any]]:
    every = [name for name, _ in check.checks(CPU)]
    wanted = [name for name in every if only in name]
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        chosen = [(name, run) for name, run in check.checks(CPU) if name in wanted]
        patch.setattr(check, "checks", lambda device: chosen)
        results = check.run_checks([CPU], lines.append)
    assert len(lines) == len(results) == len(wanted) > 0
    for line, result in zip(lines, results, strict=True):
        assert line.startswith("ok " if result["ok"] else "FAILED ") and result["name"] in line
    return results


@pytest.fixture
def plant() -> Iterator[Callable[[str, Callable[..., Any]], None]]:
    """Puts a wrong kernel in the place of the CPU's."""
    library = torch.library.Library("knnext", "FRAGMENT")

    def put(name: str, kernel: Callable[..., Any]) -> None:
        library.impl(name, kernel, "CPU", allow_override=True)

    yield put
    library._destroy()


def test_every_check_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--check", "--json"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["exit_code"] == 0 and all(entry["ok"] for entry in facts["checks"])
    bases = {name.split(".")[0] for name in NAMES} | {"gather_tokens", "gradients"}
    told = " ".join(entry["name"] for entry in facts["checks"])
    assert [base for base in bases if base not in told] == []
    assert "checks passed on the CPU and" in said.err
    for fact in ("environment", "cards", "torch", "knnext", "cpu", "loaded"):
        assert fact in facts


def nearly(run: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that is off by a hundredth."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            out = run(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out * 1.01
        return tuple(t * 1.01 if t.is_floating_point() else t for t in out)

    return wrong


@pytest.mark.parametrize("name", NAMES + GRADIENT_NAMES)
def test_a_wrong_kernel_is_found(name: str, plant) -> None:
    base = name.split(".")[0]
    right = getattr(reference, base, None) or _gradients.GRADIENTS[base]
    plant(name, nearly(right))
    only = {"_rescore_gradients": "rescore gradients"}.get(base, base)
    only = "mixing gradients" if base.startswith("_knn") else only
    results = [r for r in run_checks(only) if "gradients" in only or "gradients" not in r["name"]]
    assert [entry["name"] for entry in results if entry["ok"]] == []
    assert all(entry["error"] for entry in results)


def test_a_kernel_that_wavers_and_one_that_raises_are_found(plant) -> None:
    calls = []

    def wavers(keys: torch.Tensor) -> torch.Tensor:
        calls.append(keys)
        return reference.key_sqnorms(keys) * (1 + 1.2e-7 * (len(calls) % 2))

    plant("key_sqnorms", wavers)
    (result,) = run_checks("the same bits twice")
    assert not result["ok"] and "key_sqnorms gave other bits" in result["error"]

    def raises(*args: Any) -> None:
        raise MemoryError("no kernel image")

    plant("merge_topk", raises)
    (result,) = run_checks("merge_topk")
    assert "no kernel image" in result["error"]


def test_a_failed_check_is_the_exit_code(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(device: torch.device) -> None:
        raise AssertionError("planted")

    monkeypatch.setattr(check, "checks", lambda device: [("one", wrong), ("two", lambda _: None)])
    assert main(["doctor", "--check"]) == 1
    said = capsys.readouterr().out
    assert "FAILED cpu" in said and "AssertionError: planted" in said and "1 of 2" in said
    assert main(["doctor", "--check", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert [entry["ok"] for entry in facts["checks"]] == [False, True]


def test_a_gpu_is_also_checked_for_its_slow_path_and_a_graph(monkeypatch) -> None:
    monkeypatch.setattr(check, "REPORT", SimpleNamespace(cuda=""))
    here, there = (
        [name for name, _ in check.checks(torch.device(kind))] for kind in ("cpu", "cuda")
    )
    assert there[: len(here)] == here
    assert there[len(here) :] == ["knn_search, its slow path forced", "a captured graph"]
    monkeypatch.setattr(check, "REPORT", SimpleNamespace(cuda="sm_75"))
    names = [name for name, _ in check.checks(torch.device("cuda"))]
    assert names == [*here, "a captured graph"], "the reference has no slow path"


def test_a_card_that_cannot_run_is_told(monkeypatch) -> None:
    from knnext.cli import doctor as module
    from knnext.ops import _cards

    monkeypatch.setattr(module, "visible_cards", lambda: [_cards.Card("Tesla T4", 75)])
    monkeypatch.setattr(module, "built_for", lambda: ("13.0", "8.0;9.0a"))
    facts = doctor()
    assert facts["cards"][0]["capability"] == 75
    assert "cannot run the CUDA kernels: Tesla T4 is sm_75" in render(facts)


def test_the_environment_holds_what_matters_and_no_secret(monkeypatch) -> None:
    monkeypatch.setenv("KNNEXT_SM90", "0")
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = doctor()["environment"]
    assert found["KNNEXT_SM90"] == "0" and "secret" not in str(found)
