"""How a model is loaded: dtype, attention, tokenizer, GGUF, adapters, placement."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.corpus import Document
from knnext.lm.identity import model_identity, model_parts
from knnext.lm.key_layer import capture_hidden_states, find_key_module
from knnext.lm.load import load_lm, save_lm
from knnext.lm.train import train_tokenizer
from tests.lm.folders import edit_weights
from tests.lm.tiny_models import random_tokens, tiny

transformers = pytest.importorskip("transformers")

# dtype


def processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(
        f"processor\t: 0\nflags\t\t: fpu {flags} sse\nprocessor\t: 1\nflags\t: {flags}\n"
    )
    monkeypatch.setattr("knnext.lm.model_dtype._CPUINFO", path)


@pytest.mark.parametrize(
    ("held", "flags", "asked", "loaded"),
    [
        ("bfloat16", "avx2", "auto", "float32"),
        ("bfloat16", "avx512_bf16", "auto", "bfloat16"),
        ("bfloat16", "avx512f amx_bf16", "auto", "bfloat16"),
        ("float16", "amx_bf16", "auto", "float32"),  # bfloat16 would round it
        ("float32", "amx_bf16", "auto", "float32"),
        ("bfloat16", "avx2", "checkpoint", "bfloat16"),
        ("float16", "avx2", "checkpoint", "float16"),
        ("float32", "avx2", "bfloat16", "bfloat16"),
        ("bfloat16", "avx512_bf16", "float32", "float32"),
        ("float32", "avx2", "float16", "float16"),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_dtype(
    held: str,
    flags: str,
    asked: str,
    loaded: str,
    declared: bool,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = model_folder("llama")
    edit_weights(folder, lambda t: t.update({n: v.to(getattr(torch, held)) for n, v in t.items()}))
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    if declared:
        config["dtype"] = held
    (folder / "config.json").write_text(json.dumps(config))
    processor(monkeypatch, tmp_path, flags)
    model, _ = load_lm(folder, model_dtype=asked)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, loaded)}
    assert model_parts(model)["dtype"] == loaded


def test_bfloat16_is_slow_without_onednn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from knnext.lm.model_dtype import fast_bfloat16

    processor(monkeypatch, tmp_path, "avx512_bf16")
    assert fast_bfloat16()
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert not fast_bfloat16()


def test_a_dtype_of_torch_and_a_wrong_one(saved: Callable[[str], Path]) -> None:
    assert load_lm(saved("gpt2"), model_dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    for wrong in ("bf16", torch.int8, "float64"):
        with pytest.raises(ValueError, match=r"model_dtype must be one of auto, .*; got"):
            load_lm(saved("gpt2"), model_dtype=wrong)


# Attention, revision, tokenizer, placement


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_attention(kind: str, saved: Callable[[str], Path]) -> None:
    model, _ = load_lm(saved("llama"), attn_implementation=kind)
    assert model.config._attn_implementation == kind


def test_attention_that_is_none_or_code(saved: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"attention that is none"):
        load_lm(saved("llama"), attn_implementation="attention that is none")
    with pytest.raises(ValueError, match=r"code from a hub.*--trust-remote-code"):
        load_lm(saved("llama"), attn_implementation="someone/attention")


def test_revision(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="revision 'v2' is for a hub name"):
        load_lm(saved("llama"), revision="v2")
    asked: list[Any] = []

    def config_dict(cls: type, source: str, **options: Any) -> Any:
        asked.append((source, options.get("revision")))
        raise OSError("no network")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", classmethod(config_dict))
    with pytest.raises(OSError, match="no network"):
        load_lm("someone/model", revision="v2")
    assert asked == [("someone/model", "v2")]


def test_another_tokenizer(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = model_folder("gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load_lm(folder)
    with pytest.raises(ValueError, match=r"has 258 tokens; .* knows 97"):
        load_lm(folder, tokenizer=tmp_path)
    config = transformers.GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.save_pretrained(folder)
    assert len(load_lm(folder, tokenizer=str(tmp_path))[1]) == 258


def test_device_map(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="places the model itself"):
        load_lm(saved("gpt2"), device_map="auto", device="cpu")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "accelerate", None)
        with pytest.raises(ImportError, match=r'needs accelerate: pip install "\.'):
            load_lm(saved("gpt2"), device_map="auto")
    pytest.importorskip("accelerate")
    model, _ = load_lm(saved("gpt2"), device_map="auto")
    assert model_identity(model)[1] == model_identity(load_lm(saved("gpt2"))[0])[1]


@pytest.mark.parametrize(
    ("option", "package"), [("gguf", "gguf"), ("gguf", "accelerate"), ("adapter", "peft")]
)
def test_a_package_that_is_missing(
    option: str,
    package: str,
    saved: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = saved("gpt2")
    monkeypatch.setitem(sys.modules, "gguf", sys)  # there, as far as anybody asks
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"adapter": "peft"}.get(option, option)
    with pytest.raises(ImportError, match=rf'need {package}: pip install "\.\[{extra}\]"'):
        load_lm(folder, **{option: tmp_path / "x"})


# GGUF


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder of GGUF files, the model in them, its tokenizer."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from tests.lm.gguf_files import write_gguf

    tokenizer = train_tokenizer([Document("a", "the quick brown fox " * 40)], 258)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    folder = tmp_path_factory.mktemp("gguf")
    for kind in ("F32", "Q8_0", "Q4_1"):
        write_gguf(folder / f"{kind}.gguf", model, tokenizer, kind)
    return folder, model, tokenizer


@pytest.mark.parametrize(("kind", "off"), [("F32", 1e-6), ("Q8_0", 0.02), ("Q4_1", 0.2)])
def test_gguf(llama_gguf: Any, kind: str, off: float, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model, tokenizer = llama_gguf
    ids = torch.arange(20)[None] + 60
    found, words = load_lm(folder, gguf=f"{kind}.gguf")
    with torch.no_grad():
        moved = (found(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
    assert (kind != "F32") * 1e-4 <= moved <= off
    assert words("the fox")["input_ids"] == tokenizer("the fox")["input_ids"]
    assert model_parts(found)["quantization"] == f"GGUF {kind}"
    same, _ = load_lm(folder / f"{kind}.gguf")
    assert model_identity(same) == model_identity(found)
    assert capsys.readouterr().err == ""  # no bars


def test_gguf_takes_dtype_and_tokenizer(
    llama_gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, tokenizer = llama_gguf
    tokenizer.save_pretrained(tmp_path)
    file = folder / "Q4_1.gguf"
    assert load_lm(file, model_dtype="bfloat16", tokenizer=tmp_path)[0].dtype == torch.bfloat16
    processor(monkeypatch, tmp_path, "amx_bf16")
    assert load_lm(file)[0].dtype == torch.bfloat16
    processor(monkeypatch, tmp_path, "avx2")
    assert load_lm(file)[0].dtype == torch.float32


def test_gguf_that_is_none(llama_gguf: Any, tmp_path: Path) -> None:
    folder, _, _ = llama_gguf
    with pytest.raises(FileNotFoundError, match=r"no GGUF file Q5.gguf in .*there: F32.gguf, Q4_1"):
        load_lm(folder, gguf="Q5.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=r"bad\.gguf is no GGUF file"):
        load_lm(tmp_path, gguf="bad.gguf")
    whole = (folder / "Q8_0.gguf").read_bytes()
    for length in (len(whole) // 2, 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is damaged or cut") as error:
            load_lm(tmp_path / "cut.gguf")
        assert "\n" not in str(error.value)


def test_a_folder_of_gguf_files_says_how_to_take_one(
    model_folder: Callable[[str], Path],
) -> None:
    folder = model_folder("llama")
    (folder / "model.safetensors").rename(folder / "model-Q8.gguf")
    with pytest.raises(FileNotFoundError, match=r"give --gguf model-Q8\.gguf"):
        load_lm(folder)


# Adapters


def adapter_of(folder: Path, model: Any, out: Path, **options: Any) -> Any:
    """A random LoRA on the saved model, saved; the model that peft makes of both."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    given = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", **options}
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **given)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    wrapped.save_pretrained(out)
    return wrapped


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "opt_post_norm"])
def test_adapter(name: str, tmp_path: Path) -> None:
    """Kept in the layers it gives peft's own states; merged, those but for rounding."""
    tokenizer = train_tokenizer([Document("a", "the quick brown fox " * 40)], 258)
    save_lm(tmp_path / "model", tiny(name), tokenizer)
    wrapped = adapter_of(tmp_path, tiny(name), tmp_path / "lora")
    kept, _ = load_lm(tmp_path / "model", adapter=tmp_path / "lora")
    merged, _ = load_lm(tmp_path / "model", adapter=str(tmp_path / "lora"), merge_adapter=True)
    states = []
    for model in (tiny(name), wrapped, kept, merged):
        for layer in ("att", "ffn"):
            with torch.no_grad(), capture_hidden_states(model, layer) as captured:
                model(input_ids=random_tokens(20)[None])
                states.append(captured.states(1))
        found = find_key_module(model, "att").name.removeprefix("base_model.model.")
        assert found == find_key_module(tiny(name), "att").name
    base, base_ffn, peft_att, peft_ffn, kept_att, kept_ffn, merged_att, merged_ffn = states
    assert (base - peft_att).abs().max() > 1e-3 and (base_ffn - peft_ffn).abs().max() > 1e-3
    assert torch.equal(peft_att, kept_att) and torch.equal(peft_ffn, kept_ffn)
    assert (merged_att - kept_att).abs().max() < 1e-4
    assert (merged_ffn - kept_ffn).abs().max() < 1e-4
    base_parts, kept_parts, merged_parts = map(model_parts, (tiny(name), kept, merged))
    assert model_identity(wrapped) == model_identity(kept)
    assert kept_parts == model_parts(wrapped)
    assert kept_parts["weights"] == base_parts["weights"] != merged_parts["weights"]
    assert merged_parts["adapter"] == f"merged {kept_parts['adapter']}"
    assert len({model_identity(m)[1] for m in (tiny(name), kept, merged)}) == 3


def test_what_an_adapter_is_known_by(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Its weights and its scale, which no tensor holds; not where it lies."""
    model = tiny("llama")
    seen = set()
    for number, options in enumerate(({}, {"lora_alpha": 9}, {"r": 3}, {"use_rslora": True})):
        adapter_of(saved("llama"), model, tmp_path / str(number), **options)
        loaded, _ = load_lm(saved("llama"), adapter=tmp_path / str(number))
        seen.add((model_identity(loaded)[1], model_parts(loaded)["adapter"]))
    assert len({revision for revision, _ in seen}) == len({part for _, part in seen}) == 4
    (tmp_path / "0").rename(tmp_path / "moved")
    moved, _ = load_lm(saved("llama"), adapter=tmp_path / "moved")
    assert (model_identity(moved)[1], model_parts(moved)["adapter"]) in seen


def test_adapters_that_do_not_fit(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    peft = pytest.importorskip("peft")
    with pytest.raises(FileNotFoundError, match=r"no adapter at .*no such folder"):
        load_lm(saved("llama"), adapter=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no adapter in .*adapter_config\.json"):
        load_lm(saved("llama"), adapter=saved("llama"))
    adapter_of(saved("llama"), tiny("llama"), tmp_path / "lora")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_lm(saved("gpt2"), adapter=tmp_path / "lora")
    with pytest.raises(ValueError, match="give that as --model and this folder as --adapter"):
        load_lm(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "layers.1" in name)]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"does not fit the model: .*missing adapter keys"):
        load_lm(saved("llama"), adapter=tmp_path / "lora")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        load_lm(saved("llama"), adapter=tmp_path / "lora")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(copy.deepcopy(tiny("llama")), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="PROMPT_TUNING, which puts virtual tokens"):
        load_lm(saved("llama"), adapter=tmp_path / "prompt")


def test_merge_needs_an_adapter(saved: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="merge_adapter is for an adapter"):
        load_lm(saved("llama"), merge_adapter=True)
