"""load_lm(quantization=, compile=): by the real packages, and what is said without them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.lm.hidden_states import hidden_states
from knnext.lm.identity import model_identity, model_parts
from knnext.lm.load import load_lm
from knnext.lm.quantized import QUANTIZATIONS, is_quantized
from tests.lm.folders import edit_json
from tests.lm.tiny_models import random_tokens

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SAID = {
    "8bit": "bitsandbytes 8bit",
    "4bit": "bitsandbytes 4bit nf4",
    "torchao:int8wo": "torchao Int8WeightOnlyConfig",
    "torchao:int8dq": "torchao Int8DynamicActivationInt8WeightConfig",
    "torchao:float8wo": "torchao Float8WeightOnlyConfig",
}


def needed(kind: str) -> None:
    pytest.importorskip("torchao" if kind.startswith("torchao") else "bitsandbytes")


def keys(model: Any, layer: str) -> torch.Tensor:
    batches = hidden_states(
        model, random_tokens(30), key_layer=layer, block_size=16, dtype=torch.float32
    )
    return torch.cat([batch.keys for batch in batches])


def test_the_names_are_those_of_the_command_line() -> None:
    from knnext.cli.parser import build_parser

    assert set(SAID) == set(QUANTIZATIONS)
    for kind in QUANTIZATIONS:
        words = ["search", "S", "x", "--model", "m", "--quantization", kind, "--compile"]
        args = build_parser().parse_args(words)
        assert args.quantization == kind and args.compile


@pytest.mark.parametrize("kind", SAID)
def test_quantization(
    kind: str, saved: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    needed(kind)
    plain, _ = load_lm(saved("llama"))
    model, _ = load_lm(saved("llama"), quantization=kind, device="cpu")
    assert is_quantized(model) and not is_quantized(plain)
    parts = model_parts(model)
    assert parts["quantization"] == SAID[kind] and parts["dtype"] == "float32"
    before = model_identity(model)
    for layer in ("att", "ffn"):
        change = (keys(model, layer) - keys(plain, layer)).abs().max()
        assert 0 < change < 0.5
    assert model_identity(model) == before  # also after it has run
    assert model_identity(load_lm(saved("llama"), quantization=kind)[0]) == before
    assert model_identity(plain)[1] != before[1]
    assert "MatMul8bitLt" not in capsys.readouterr().err


def test_a_config_of_transformers_serves_too(saved: Callable[[str], Path]) -> None:
    needed("4bit")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model, _ = load_lm(saved("llama"), quantization=config)
    assert model_parts(model)["quantization"] == "bitsandbytes 4bit fp4"


@pytest.mark.parametrize("kind", ["8bit", "torchao"])
def test_a_package_that_is_missing(
    kind: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "torchao" if kind == "torchao" else "bitsandbytes"
    monkeypatch.setitem(sys.modules, package, None)
    message = rf'quantization \S+ needs {package}: pip install "\.\[{package}\]"'
    with pytest.raises(ImportError, match=message):
        load_lm(saved("llama"), quantization=kind)


def test_what_is_refused(
    saved: Callable[[str], Path],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for wrong in ("int3", "torchao:int3", 8, True):
        with pytest.raises(ValueError, match=r"quantization must be one of 8bit, 4bit, .*; got"):
            load_lm(saved("llama"), quantization=wrong)
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)  # there, as far as anybody asks
    with pytest.raises(ValueError, match=r"weights that are not: q\.gguf is GGUF"):
        load_lm(saved("llama"), quantization="8bit", gguf="q.gguf")
    with pytest.raises(ValueError, match="leave one of them out"):
        load_lm(saved("llama"), quantization="8bit", adapter="a", merge_adapter=True)
    folder = model_folder("llama")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="is quantized already"):
        load_lm(folder, quantization="8bit")


def test_what_was_not_quantized_is_told(saved: Callable[[str], Path]) -> None:
    """GPT-2's layers are no nn.Linear, and torchao passes them by without a word."""
    needed("torchao")
    with pytest.raises(ValueError, match=r"changed nothing in .* no layers such as its Conv1D"):
        load_lm(saved("gpt2"), quantization="torchao:int8wo")


@pytest.mark.slow
def test_compile(saved: Callable[[str], Path]) -> None:
    """With torch's own compiler: the same states but for rounding, the same model."""
    plain, _ = load_lm(saved("llama"))
    model, _ = load_lm(saved("llama"), compile=True)
    for layer in ("att", "ffn"):
        torch.testing.assert_close(keys(model, layer), keys(plain, layer), atol=1e-5, rtol=1e-4)
    assert model_identity(model) == model_identity(plain)
    assert [b._compiled_call_impl is None for b in model.model.layers] == [False, False, True]


def test_compile_without_a_compiler(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler such as g\+\+"):
        load_lm(saved("llama"), compile=True)
