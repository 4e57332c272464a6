"""Opening models: no code of theirs runs, nothing is left at random numbers, reasons are said."""

from __future__ import annotations

import copy
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.corpus import Document
from knnext.lm.identity import model_identity
from knnext.lm.load import load_lm, save_lm
from knnext.lm.train import train_tokenizer
from tests.lm.every_model import every
from tests.lm.tiny_models import tiny

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model with a tokenizer; not to be written to."""
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


def edit_json(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, **values}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    change(tensors)
    safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})


def drop(*endings: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(endings)]:
            del tensors[name]

    return change


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


# Folders that are no whole model


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_head(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"notajson")


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 0")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def adapter(folder: Path) -> None:
    empty(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "big/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{'a': 1}")


def t5(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')


def marian(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "marian"}')


def vision(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (empty, FileNotFoundError, "the folder is empty"),
        (cut_short, ValueError, r"model\.safetensors is damaged or cut short"),
        (cut_in_head, ValueError, r"model\.safetensors is damaged or cut short"),
        (no_safetensors, ValueError, r"model\.safetensors is no safetensors file"),
        (lfs_pointer, ValueError, r"model\.safetensors is a Git LFS pointer"),
        (missing_shard, FileNotFoundError, r"model-00002-of-00002\.safetensors \(1 of 2 files"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            FileNotFoundError,
            "no weights in .*there: ",
        ),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json is missing"),
        (no_tokenizer, FileNotFoundError, r"no tokenizer in .*tokenizer\.json is missing"),
        (adapter, ValueError, "an adapter .*'big/base'.*merge_and_unload"),
        (bad_config, ValueError, r"config\.json is not JSON"),
        (t5, ValueError, "t5 is an encoder-decoder.*causal"),
        (marian, ValueError, "marian is an encoder-decoder.*causal"),
        (vision, ValueError, "type 'vit'.*not know as a causal"),
    ],
)
def test_a_folder_that_is_no_model_says_why(
    change: Callable[[Path], None],
    kind: type[Exception],
    message: str,
    model_folder: Callable[[str], Path],
) -> None:
    folder = model_folder("llama")
    change(folder)
    with pytest.raises(kind, match=message) as error:
        load_lm(folder)
    assert str(folder) in str(error.value) or "encoder-decoder" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# What a model is known by


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
