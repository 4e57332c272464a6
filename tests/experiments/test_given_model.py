"""How experiments load a model that is given: as the commands do, and kept apart by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.cli.experiment import _preset
from knnext.cli.parser import build_parser
from knnext.corpus import Document
from knnext.experiments.lab import Lab
from knnext.experiments.lab.presets import TINY

pytest.importorskip("transformers")


def lab_of(folder: Path, tmp_path: Path, *words: str) -> Any:
    given = ["experiment", "padding", "--preset", "tiny", "--model", str(folder), *words]
    return Lab(_preset(build_parser().parse_args(given)), tmp_path / "lab", say=lambda _line: None)


def test_options_reach_the_model(tmp_path: Path) -> None:
    from knnext.lm.load import save_lm
    from knnext.lm.train import train_tokenizer
    from tests.lm.tiny_models import tiny

    tokenizer = train_tokenizer([Document("a", "the quick brown fox " * 40)], 258)
    save_lm(tmp_path / "model", tiny("gpt2"), tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "words").mkdir(exist_ok=True)
        (tmp_path / "model" / name).rename(tmp_path / "words" / name)
    words = ["--tokenizer", str(tmp_path / "words")]
    other = train_tokenizer([Document("a", "fox")], 258)
    assert len(other) > 97  # more than the model has
    with pytest.raises(ValueError, match="knows 97"):
        lab_of(tmp_path / "model", tmp_path, *words).lm()
    lab = lab_of(tmp_path / "model", tmp_path, *words)
    assert len(lab.tokenizer) == len(tokenizer)


def test_dtype_and_cache(tmp_path: Path) -> None:
    import transformers

    from knnext.lm.load import save_lm
    from knnext.lm.train import train_tokenizer

    config = transformers.GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tokenizer = train_tokenizer([Document("a", "the quick brown fox " * 40)], 258)
    save_lm(tmp_path / "model", model.bfloat16(), tokenizer)
    plain = lab_of(tmp_path / "model", tmp_path)
    assert plain.lm().model.dtype == torch.bfloat16  # the checkpoint's, on any machine
    assert "model_options" not in plain.preset.to_dict() and "model_options" not in TINY.to_dict()
    wide = lab_of(tmp_path / "model", tmp_path, "--model-dtype", "float32")
    assert wide.lm().model.dtype == torch.float32
    assert wide.lm().settings != plain.lm().settings
    assert wide.preset.to_dict()["model_options"] == {"model_dtype": "float32"}
