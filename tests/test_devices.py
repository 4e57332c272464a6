"""Devices that are not here are refused in a sentence, wherever one is named."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnext.cli.session import device_of
from knnext.devices import checked_device
from knnext.experiments.lab import Lab
from knnext.experiments.lab.presets import preset
from knnext.index import ExactIndex
from knnext.lm.load import load_lm
from knnext.lm.train import TrainConfig, train_lm

PLACES: dict[str, Callable[[str, Path], Any]] = {
    "ExactIndex": lambda device, _: ExactIndex.from_tensors(torch.ones(3, 2), device=device),
    "load_lm": lambda device, folder: load_lm(folder, device=device),
    "train_lm": lambda device, _: train_lm(
        np.zeros(600, np.int64), None, seconds=1, config=TrainConfig(), device=device
    ),
    "Lab": lambda device, folder: Lab(preset("tiny"), folder, device=device),
}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("count", "device", "words"),
    [
        (0, "cuda", "device cuda: torch .*; `knnext doctor` tells more"),
        (2, "cuda:2", "device cuda:2: the GPUs here are cuda:0 to cuda:1"),
        (2, "gpu", "device must be such as cpu, cuda or cuda:1, got 'gpu'"),
    ],
)
def test_a_device_that_is_not_here(
    place: str, count: int, device: str, words: str, gpus: Any, tmp_path: Path
) -> None:
    gpus(count)
    with pytest.raises(ValueError, match=words):
        PLACES[place](device, tmp_path)


def test_a_command_names_its_option(gpus: Any) -> None:
    gpus(0)
    with pytest.raises(ValueError, match=r"^--device cuda:1: torch"):
        device_of(argparse.Namespace(device="cuda:1"))


def test_devices_that_are_here(gpus: Any) -> None:
    gpus(2)
    for device in ("cpu", "cuda", "cuda:1", torch.device("cuda", 0), "meta"):
        assert checked_device(device) == torch.device(device)
