"""What a model is known by."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from knnext.corpus import Document
from knnext.lm.identity import model_identity, sha256, tokenizer_hash
from knnext.lm.train import train_tokenizer
from tests.lm.tiny_models import tiny

pytest.importorskip("transformers")


@pytest.mark.parametrize("what", ["one value", "a row", "last layer", "buffer", "dtype", "names"])
def test_a_changed_copy_is_another_model(what: str) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.config._commit_hash = "0" * 40
    model.register_buffer("shift", torch.zeros(3))
    was = model_identity(model)
    with torch.no_grad():
        if what == "one value":
            model.model.embed_tokens.weight[3, 5] += 1e-3
        elif what == "a row":
            model.model.embed_tokens.weight[[3, 4]] = model.model.embed_tokens.weight[[4, 3]]
        elif what == "last layer":
            model.model.layers[-1].mlp.down_proj.weight.mul_(1.001)
        elif what == "buffer":
            model.shift[0] = 1
        elif what == "dtype":
            model.bfloat16()
        else:
            model.other = model._modules.pop("lm_head")
    assert model_identity(model)[1] != was[1]
    assert model_identity(copy.deepcopy(model)) == model_identity(model)


def test_identity_of_large_and_odd_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knnext.lm.identity._PIECE", 100)
    module = torch.nn.ParameterDict(
        {
            "a": torch.nn.Parameter(torch.randn(7, 33)),
            "b": torch.nn.Parameter(torch.randn(5, 40).t(), requires_grad=False),
            "c": torch.nn.Parameter(torch.randn(0, 3)),
            "d": torch.nn.Parameter(torch.randn(9, dtype=torch.float64)),
            "e": torch.nn.Parameter(torch.randn(9).to(torch.float8_e4m3fn), requires_grad=False),
            "f": torch.nn.Parameter(torch.randn(())),
        }
    )
    seen = {model_identity(module)[1]}
    for name in "abdf":
        module[name].data[(-1,) * module[name].ndim] += 1
        seen.add(model_identity(module)[1])
    assert len(seen) == 5


def test_old_forms_of_identity_are_still_read() -> None:
    model = copy.deepcopy(tiny("llama"))
    old = model_identity(model, "weights:0123456789abcdef")[1]
    assert old.startswith("weights:") and len(old) == 24
    model.config._commit_hash = "a" * 40
    assert model_identity(model, "b" * 40)[1] == "a" * 40
    assert model_identity(model, "tensors:0")[1] == model_identity(model)[1]


CALLS: list[dict[str, Any]] = [
    {"padding": True},
    {"padding": "max_length", "max_length": 9},
    {"truncation": True, "max_length": 2},
    {"truncation": True, "max_length": 3, "padding": True, "return_overflowing_tokens": True},
]


@pytest.mark.parametrize("options", CALLS, ids=str)
def test_a_call_makes_no_other_tokenizer(options: dict[str, Any]) -> None:
    """How the latest batch was padded and cut stands in the definition that is hashed."""
    words = train_tokenizer([Document("a", "the quick brown fox " * 40)], 258)
    was, text = tokenizer_hash(words), words.backend_tokenizer.to_str()
    assert was == sha256(text.encode())  # as stores that were built before have it
    words(["a", "the quick brown fox"], **options)
    assert words.backend_tokenizer.to_str() != text and tokenizer_hash(words) == was
    old = sha256(words.backend_tokenizer.to_str().encode())
    assert tokenizer_hash(words, old) == old and tokenizer_hash(words, was) == was


def test_other_tokens_are_another_tokenizer() -> None:
    words = train_tokenizer([Document("a", "the quick brown fox " * 40)], 258)
    was = tokenizer_hash(words)
    words.add_tokens(['"padding":null,"truncation":{'])
    assert tokenizer_hash(words) != was and tokenizer_hash(words, was) != was
