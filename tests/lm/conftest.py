"""A folder with a saved model, for tests that open or spoil one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from knnext.corpus import Document
from knnext.lm.load import save_lm
from knnext.lm.train import train_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model with a tokenizer; not to be written to."""
    from tests.lm.every_model import every  # skips without transformers
    from tests.lm.tiny_models import tiny

    tokenizer = train_tokenizer([Document("a", "the quick brown fox " * 40)], 258)
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name.replace(",", "_"))
            model = tiny(name) if name in ("gpt2", "llama", "gpt_neox") else every(name)
            save_lm(folders[name], model, tokenizer)
        return folders[name]

    return folder


@pytest.fixture
def model_folder(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(saved(name), tmp_path / "model"))

    return copied
