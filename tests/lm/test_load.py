"""Opening models: no code of theirs runs, nothing is left at random numbers, reasons are said."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.lm.load import load_lm
from tests.lm.folders import drop, edit_json, edit_weights

safetensors_torch = pytest.importorskip("safetensors.torch")

# Code that a model brings


CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import {base}
class Config(__import__("transformers").LlamaConfig):
    model_type = "mine"
class Mine({base}):
    config_class = Config
"""


def plant(folder: Path, where: str) -> Path:
    """Code in the folder that leaves a mark when it runs, reached from one of its files."""
    mark = folder.parent / "ran"
    for name, base in (("model", "LlamaForCausalLM"), ("tokenizer", "PreTrainedTokenizerFast")):
        text = CODE.format(mark=str(mark), base=base)
        (folder / f"mine_{name}.py").write_text(text)
    if where == "config":
        auto = {"AutoConfig": "mine_model.Config", "AutoModelForCausalLM": "mine_model.Mine"}
        edit_json(folder / "config.json", model_type="mine", auto_map=auto)
    elif where == "model":  # a known config without a causal LM, and code that would be one
        auto = {"AutoModelForCausalLM": "mine_model.Mine"}
        edit_json(folder / "config.json", model_type="vit", auto_map=auto)
    elif where == "tokenizer":
        edit_json(
            folder / "tokenizer_config.json",
            tokenizer_class="Mine",
            auto_map={"AutoTokenizer": [None, "mine_tokenizer.Mine"]},
        )
        edit_json(folder / "config.json", model_type="mine", auto_map={"AutoTokenizer": "x"})
    elif where == "kernel":
        edit_json(folder / "config.json", attn_implementation="somebody/their-attention")
    elif where == "kernel of a part":
        part = {"model_type": "llama", "_attn_implementation_internal": {"": "a/b"}}
        edit_json(folder / "config.json", text_config=part)
    elif where == "generate":
        (folder / "custom_generate").mkdir()
        text = f"import pathlib\npathlib.Path({str(mark)!r}).write_text('ran')\ndef generate(): 0\n"
        (folder / "custom_generate" / "generate.py").write_text(text)
    return mark


@pytest.mark.parametrize("where", ["config", "model", "tokenizer", "kernel", "kernel of a part"])
def test_no_code_of_a_model_is_run(
    where: str, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llama")
    mark = plant(folder, where)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match="--trust-remote-code") as error:
        load_lm(folder)
    assert "\n" not in str(error.value)
    assert ("auto_map" in str(error.value)) == ("kernel" not in where)
    assert not mark.exists()
    assert sys.stdin.read() == "y\n" * 9  # nobody asked


def test_code_that_is_not_needed_is_left_alone(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known type with an auto_map opens as transformers' own class; so does custom_generate."""
    folder = model_folder("llama")
    mark = plant(folder, "generate")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "mine_model.Mine"})
    edit_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "mine_tokenizer.Mine"]}
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    model, _ = load_lm(folder)
    assert type(model).__module__.startswith("transformers.")
    assert not mark.exists()


def test_trusted_code_runs(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llama")
    mark = plant(folder, "config")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    model, _ = load_lm(folder, trust_remote_code=True)
    assert type(model).__name__ == "Mine" and mark.exists()


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "ran")


def test_pickled_weights_run_nothing(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    mark = folder.parent / "ran"
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_lm(folder)
    assert not mark.exists()


def test_every_opening_says_whether_code_may_run() -> None:
    """In the package, its tests and benchmarks: no from_pretrained leaves it to transformers."""
    import ast

    root = Path(__file__).resolve().parents[2]
    openers = {"from_pretrained", "load_dataset", "from_config"}
    bad = []
    for path in (p for d in ("knnext", "benchmarks", "tests") for p in (root / d).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            given = {keyword.arg for keyword in node.keywords}
            if node.func.attr in openers and not given & {"trust_remote_code", None}:
                bad.append(f"{path.relative_to(root)}:{node.lineno}")
    assert not bad


# Weights that are not there


@pytest.mark.parametrize(
    ("name", "gone", "named"),
    [
        ("llama", "layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
        ("llama", "model.norm.weight", "model.norm.weight"),
        ("llama", "lm_head.weight", "lm_head.weight"),  # not tied there
        ("gpt2", "h.2.mlp.c_fc.bias", "transformer.h.2.mlp.c_fc.bias"),
        ("gpt2", "wte.weight", "wte.weight"),  # the source that lm_head is tied to
        ("gpt_neox", "final_layer_norm.bias", "final_layer_norm.bias"),
        ("mixtral", "layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_missing_weights_are_named(
    name: str, gone: str, named: str, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder(name)
    before = len(safetensors_torch.load_file(folder / "model.safetensors"))
    edit_weights(folder, drop(gone, gone.replace("mlp.gate", "block_sparse_moe.gate")))
    assert len(safetensors_torch.load_file(folder / "model.safetensors")) < before
    with pytest.raises(ValueError, match="lacks weights") as error:
        load_lm(folder)
    assert named in str(error.value) and str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_many_missing_weights_are_counted(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    edit_weights(folder, drop("mlp.up_proj.weight", "mlp.gate_proj.weight", "norm.weight"))
    with pytest.raises(ValueError, match=r"and [0-9]+ more"):
        load_lm(folder)


def test_weights_under_other_names_are_missing(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("mlp.", "ffn.")] = tensors.pop(name)

    edit_weights(folder, rename)
    with pytest.raises(ValueError, match=r"mlp\..*others that the model does not know: .*ffn\."):
        load_lm(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_of_other_shapes_are_named(name: str, model_folder: Callable[[str], Path]) -> None:
    folder = model_folder(name)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        chosen = next(n for n in sorted(tensors) if ".mlp." in n and n.endswith("weight"))
        tensors[chosen] = tensors[chosen][:, :-1].contiguous()

    edit_weights(folder, cut)
    with pytest.raises(ValueError, match=r"other shapes than its config: \S*mlp\S* is \(") as error:
        load_lm(folder)
    assert "report" not in str(error.value)


def test_tied_weights_are_no_loss(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("gpt2")
    assert "lm_head.weight" not in safetensors_torch.load_file(folder / "model.safetensors")
    model, _ = load_lm(folder)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.bias"])
def test_weights_that_are_no_numbers_are_refused(
    model_folder: Callable[[str], Path], name: str, value: float
) -> None:
    folder = model_folder("gpt2")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].flatten()[1] = value

    edit_weights(folder, change)
    with pytest.raises(ValueError, match=f"inf or nan: {name}"):
        load_lm(folder)


def test_weights_that_the_model_does_not_use_are_named(
    model_folder: Callable[[str], Path],
) -> None:
    folder = model_folder("gpt2")
    edit_json(folder / "config.json", n_layer=2)  # the weights have three
    with pytest.warns(UserWarning, match=r"does not use: transformer\.h\.2\."):
        load_lm(folder)


@pytest.mark.parametrize(
    "facts",
    [
        {"_attn_implementation": "someone/attention"},
        {"attn_implementation": "someone/attention:run"},
        {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}},
    ],
)
def test_a_hub_model_is_looked_at_as_a_folder_is(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any]
) -> None:
    import transformers

    found = json.loads((model_folder("gpt2") / "config.json").read_text())
    monkeypatch.setattr(
        transformers.PretrainedConfig,
        "get_config_dict",
        classmethod(lambda cls, source, **_: ({**found, **facts}, {})),
    )
    with pytest.raises(ValueError, match="someone/model wants to run Python code of its own"):
        load_lm("someone/model")
