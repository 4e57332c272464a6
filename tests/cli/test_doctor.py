"""The doctor: every fact it prints is one that the process can confirm."""

from __future__ import annotations

import json

import pytest
import torch

from knnext.cli.doctor import Search, doctor, render
from knnext.ops import REPORT


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
    assert "2.10 Tflop" in text  # 2 * 1024 * 10^6 * 1024


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
