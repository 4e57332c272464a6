"""The markers gpu and multi_gpu: what is skipped, and what KNNEXT_REQUIRE_GPU makes of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module")
def conftest() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "marked", Path(__file__).parents[1] / "conftest.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("devices", "required", "of_one", "of_two"),
    [
        (0, "", "skip", "skip"),
        (0, "1", "fail", "fail"),
        (1, "", "run", "skip"),
        (1, "1", "run", "skip"),
        (1, "2", "run", "fail"),
        (2, "2", "run", "run"),
    ],
)
def test_as_many_devices_as_required(
    conftest: ModuleType,
    devices: int,
    required: str,
    of_one: str,
    of_two: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setenv("KNNEXT_REQUIRE_GPU", required)

    def outcome(*markers: str) -> str:
        item = SimpleNamespace(get_closest_marker=lambda name: name in markers)
        try:
            conftest.pytest_runtest_setup(item)
        except pytest.skip.Exception:
            return "skip"
        except pytest.fail.Exception:
            return "fail"
        return "run"

    assert (outcome(), outcome("gpu"), outcome("gpu", "multi_gpu")) == ("run", of_one, of_two)
