"""The demo's training: a tokenizer that writes anything, a model that learns, and can be kept."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from knnext.corpus import Document, tokenize
from knnext.lm.load import load_lm, save_lm
from knnext.lm.train import TrainConfig, _batches, rate, train_lm, train_tokenizer

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    def push(self, item): ...\n" * 30
SMALL = TrainConfig(
    num_layers=1, dim=32, num_heads=2, block_size=16, batch_size=8, learning_rate=3e-3, warmup=0.2
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([Document("a", TEXT)], vocab_size=280)


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> np.ndarray:
    return tokenize([Document("a", TEXT)], tokenizer).tokens


def test_tokenizer_writes_any_text(tokenizer: Any) -> None:
    assert len(tokenizer) == 280
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id is not None
    for text in (TEXT, "naïve – \x00\x7f 漢字 🙂", "  leading and   inner \t spaces\n\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(TEXT)["input_ids"]) < len(TEXT) / 1.5


def test_the_model_learns(tokenizer: Any, tokens: np.ndarray) -> None:
    result = train_lm(tokens, tokenizer, SMALL, max_steps=150)
    assert result.steps == len(result.losses) == 150
    assert result.tokens == 150 * 8 * 16
    assert abs(result.losses[0] - math.log(280)) < 0.5  # begins at chance
    assert np.mean(result.losses[-10:]) < 1.0
    assert not result.model.training and result.model.config.use_cache


def test_the_same_seed_gives_the_same_model(tokenizer: Any, tokens: np.ndarray) -> None:
    first = train_lm(tokens, tokenizer, SMALL, max_steps=8)
    torch.manual_seed(99)  # what happens around it has no say
    second = train_lm(tokens, tokenizer, SMALL, max_steps=8)
    assert first.losses == second.losses
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = train_lm(tokens, tokenizer, TrainConfig(**{**vars(SMALL), "seed": 1}), max_steps=8)
    assert other.losses != first.losses


def test_time_is_kept(tokenizer: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own, in which every step takes a tenth of a second."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) / 10)
    monkeypatch.setattr("knnext.lm.train.time", clock)
    rates = []
    monkeypatch.setattr("knnext.lm.train.rate", lambda done, config: rates.append(done) or 1e-3)
    result = train_lm(tokens, tokenizer, SMALL, seconds=1.0)
    assert result.steps == 10
    assert result.seconds == pytest.approx(1.1)
    assert (
        rates[::2] == rates[1::2] == pytest.approx([i / 10 for i in range(10)])
    )  # a rate a step for both groups


def test_saved_and_loaded(tokenizer: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    model = train_lm(tokens, tokenizer, SMALL, max_steps=2).model
    save_lm(tmp_path, model, tokenizer)
    again, its_tokenizer = load_lm(tmp_path)
    ids = torch.tensor([its_tokenizer("def add(a, b):")["input_ids"]])
    assert ids[0].tolist() == tokenizer("def add(a, b):")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    generated = again.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape[1] == ids.shape[1] + 3
    assert again.generation_config.pad_token_id == tokenizer.pad_token_id
    assert its_tokenizer.bos_token_id == tokenizer.bos_token_id


@pytest.mark.parametrize("path", [Path("nowhere"), "./nowhere", "/nowhere"])
def test_a_folder_that_is_not_there(path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no language model at"):
        load_lm(path)


def test_batches_cover_the_stream() -> None:
    config = TrainConfig(block_size=10, batch_size=4)
    stream = _batches(torch.arange(1000), config)
    seen: set[int] = set()
    for _ in range(60):
        batch = next(stream)
        assert batch.shape == (4, 11) and batch.dtype == torch.int64
        assert (batch.diff(dim=1) == 1).all()  # each block is a piece of the stream
        seen.update(batch.flatten().tolist())
    assert seen >= set(range(10, 990))


def test_rate_warms_up_and_comes_down() -> None:
    config = TrainConfig(warmup=0.1, min_rate=0.1)
    rates = [rate(done / 100, config) for done in range(101)]
    assert rates[0] < 0.1 and rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rate(1.5, config) == pytest.approx(0.1)


def test_bad_arguments(tokenizer: Any, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="more than block_size=16 ids, got 16"):
        train_lm(tokens[:16], tokenizer, SMALL)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        train_lm(tokens, tokenizer, SMALL, seconds=0)
    with pytest.raises(ValueError, match=r"must be positive, got 120\.0 and 0"):
        train_lm(tokens, tokenizer, SMALL, max_steps=0)
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer([], vocab_size=256)
