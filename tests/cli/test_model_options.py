"""The options by which a model is loaded and a search is bounded, on every command that has one."""

from __future__ import annotations

import copy
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.cli import main
from knnext.cli.parser import build_parser
from knnext.corpus import Document
from knnext.datastore import Datastore
from knnext.datastore.meta import META_FILE
from knnext.datastore.meta_file import read_meta, to_json
from knnext.lm.load import save_lm
from knnext.lm.train import train_tokenizer
from tests.lm.folders import edit_weights

transformers = pytest.importorskip("transformers")

MORE = {"build": ["S", "--corpus", "x"], "tune": ["S"], "eval": ["S"], "experiment": ["padding"]}
MORE |= {"search": ["S", "text"], "generate": ["S", "text"]}


@pytest.mark.parametrize("command", MORE)
def test_every_command_with_a_model_loads_it_alike(command: str) -> None:
    words = [command, *MORE[command], "--model", "m"]
    args = build_parser().parse_args(words)
    assert args.model_dtype == ("checkpoint" if command == "experiment" else "auto")
    given = ["--model-dtype", "bfloat16", "--attn-implementation", "eager", "--revision", "r"]
    given += ["--tokenizer", "t", "--gguf", "g", "--adapter", "a", "--merge-adapter"]
    args = build_parser().parse_args([*words, *given, "--device-map", "auto"])
    found = (args.model_dtype, args.attn_implementation, args.revision, args.tokenizer)
    assert found == ("bfloat16", "eager", "r", "t")
    assert (args.gguf, args.adapter, args.merge_adapter, args.device_map) == (
        "g",
        "a",
        True,
        "auto",
    )


@pytest.mark.parametrize("command", [*MORE, "import", "doctor"])
@pytest.mark.parametrize("given", [["--dtype", "float16"], ["--dtype=float32"], ["--dtype"]])
def test_dtype_alone_is_refused(
    command: str, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = {**MORE, "import": ["old", "S"], "doctor": []}[command]
    assert main([command, *more, *given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--dtype is no option" in said
    assert ("--key-dtype" in said) == (command in ("build", "import", "doctor"))
    assert ("--model-dtype" in said) == (command in MORE)
    assert main([command, "--help"]) == 0
    assert "--dtype " not in capsys.readouterr().out


def test_dtype_alone_is_refused_in_python(tmp_path: Path) -> None:
    from knnext.datastore.build import build_datastore

    nothing: Any = None
    with pytest.raises(TypeError, match="the keys' dtype is key_dtype"):
        build_datastore(nothing, nothing, nothing, tmp_path, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"no argument 'keydtype'$"):
        build_datastore(nothing, nothing, nothing, tmp_path, keydtype=torch.float32)


# On a tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16, a tokenizer that is its own, a text."""
    path = tmp_path_factory.mktemp("options")
    tokenizer = train_tokenizer([Document("a", "the quick brown fox " * 40)], 258)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    save_lm(path / "model", model.bfloat16(), tokenizer)
    (path / "text.txt").write_text("the quick brown fox jumps\n" * 30)
    return path


Knnext = Callable[..., str]


@pytest.fixture
def knnext(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Knnext:
    """Runs a command on the store; gives what it said."""

    def run(
        command: str,
        *options: str,
        code: int = 0,
        model: Path | None = None,
        all_of_it: bool = False,
    ) -> str:
        words = {"build": ["--corpus", str(folder / "text.txt"), "--shares", "100,0,0"]}
        words["build"] += ["--block-size", "16"]
        words["search"] = ["the quick", "--k", "3"]
        store = [str(tmp_path / "store"), *words[command]]
        given = ["--model", str(model or folder / "model"), *options]
        capsys.readouterr()
        assert main([command, *store, *given]) == code, capsys.readouterr().err
        captured = capsys.readouterr()
        return captured.err if code and not all_of_it else captured.out + captured.err

    return run


def test_the_dtype_that_a_datastore_was_built_with(knnext: Knnext, tmp_path: Path) -> None:
    """`auto` takes it, whatever it would take here; another one is refused by its name."""
    knnext("build", "--model-dtype", "bfloat16")
    assert Datastore.open(tmp_path / "store").meta.model is not None
    assert (Datastore.open(tmp_path / "store").meta.model or {})["dtype"] == "bfloat16"
    knnext("search")
    said = knnext("search", "--model-dtype", "float32", code=1)
    assert "the models differ in dtype: datastore has bfloat16, asked for float32" in said
    assert "differ in weights" not in said and said.count("\n") == 1
    said = knnext("build", "--model-dtype", "float32", code=1)
    assert "the models differ in dtype: datastore has bfloat16, asked for float32" in said
    knnext("build")  # as it was begun


def test_auto_without_a_datastore(
    knnext: Knnext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knnext.lm.model_dtype.fast_bfloat16", lambda: False)
    knnext("build")
    assert (Datastore.open(tmp_path / "store").meta.model or {})["dtype"] == "float32"
    monkeypatch.setattr("knnext.lm.model_dtype.fast_bfloat16", lambda: True)
    knnext("search")  # on another machine


def test_other_weights_are_named(knnext: Knnext, folder: Path, tmp_path: Path) -> None:
    knnext("build")
    other = Path(shutil.copytree(folder / "model", tmp_path / "other"))
    edit_weights(other, lambda t: t["model.norm.weight"].mul_(1.5))
    said = knnext("search", code=1, model=other)
    assert "the models differ in weights" in said and "dtype" not in said


def forget_the_parts(store: Path) -> None:
    """As a knnext wrote it that did not know them."""
    meta = read_meta(store, META_FILE)
    assert meta.model is not None
    (store / META_FILE).write_bytes(to_json(replace(meta, model=None)))
    assert "model" not in json.loads((store / META_FILE).read_text())


def test_a_datastore_from_before_there_were_parts(
    knnext: Knnext, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was built in the checkpoint's dtype, and is searched and gone on with in that."""
    monkeypatch.setattr("knnext.lm.model_dtype.fast_bfloat16", lambda: False)
    knnext("build", "--model-dtype", "checkpoint")
    forget_the_parts(tmp_path / "store")
    before = (tmp_path / "store" / META_FILE).read_bytes()
    knnext("search")
    knnext("build")
    assert (tmp_path / "store" / META_FILE).read_bytes() == before
    said = knnext("search", "--model-dtype", "float32", code=1)
    assert "model_revision: datastore has 'tensors:" in said and "differ in" not in said


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_is_part_of_the_model(knnext: Knnext, folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from knnext.lm.load import load_lm

    model, _ = load_lm(folder / "model", model_dtype="float32")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    for seed, name in enumerate(("lora", "other")):
        torch.manual_seed(seed)
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / name)
    lora = ["--adapter", str(tmp_path / "lora")]
    knnext("build", *lora)
    knnext("search", *lora)
    said = knnext("search", code=1)
    assert "the models differ in adapter: datastore has " in said and "asked for none" in said
    assert "weights" not in said
    said = knnext("search", "--adapter", str(tmp_path / "other"), code=1)
    assert "differ in adapter" in said and "weights" not in said
    said = knnext("search", *lora, "--merge-adapter", code=1)
    assert "differ in adapter" in said and "asked for merged " in said


def test_gguf_is_part_of_the_model(knnext: Knnext, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from knnext.lm.load import load_lm
    from tests.lm.gguf_files import write_gguf

    model, tokenizer = load_lm(folder / "model")
    for kind in ("Q8_0", "Q4_1"):
        write_gguf(tmp_path / f"{kind}.gguf", model, tokenizer, kind)
    of = ["--tokenizer", str(folder / "model"), "--gguf"]
    knnext("build", *of, "Q8_0.gguf", model=tmp_path)
    knnext("search", *of, "Q8_0.gguf", model=tmp_path)
    said = knnext("search", *of, "Q4_1.gguf", code=1, model=tmp_path)
    assert "differ in quantization: datastore has GGUF Q8_0, asked for GGUF Q4_1" in said
    assert "asked for none" in knnext("search", code=1)


def test_device_and_map(knnext: Knnext) -> None:
    pytest.importorskip("accelerate")
    knnext("build", "--device-map", "auto")
    said = knnext("search", "--device-map", "auto", "--device", "cpu", code=1)
    assert "leave --device out" in said


def test_loading_options_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "padding", "--preset", "tiny", "--model-dtype", "bfloat16"]) == 1
    assert "--model-dtype is for a model that is given" in capsys.readouterr().err


# Room and memory


@pytest.mark.parametrize(("options", "row"), [([], 132), (["--key-dtype", "float32"], 260)])
def test_the_room_that_a_build_takes(
    knnext: Knnext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    row: int,
) -> None:
    """Said in the first line; refused with both numbers, and nothing written; not asked twice."""
    usage = namedtuple("usage", "total used free")
    free = {"bytes": 10_000}
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 0, free["bytes"]))
    said = knnext("build", *options, code=1, all_of_it=True)
    lines = said.splitlines()
    rows = int(lines[0].split()[0].replace(",", ""))
    assert f"({row} bytes a row), 9.77 KiB are free" in lines[0]
    assert f"({rows * row:,} bytes)" in lines[1] and "(10,000 bytes) free" in lines[1]
    assert not (tmp_path / "store").exists()
    free["bytes"] = rows * row
    assert knnext("build", *options).startswith(f"{rows:,} tokens to store")
    free["bytes"] = 0
    knnext("build", *options)  # all there
    keys = tmp_path / "store" / "keys-00000.bin"
    values = tmp_path / "store" / "values-00000.bin"
    assert keys.stat().st_size + values.stat().st_size == rows * row


def test_codes_take_room_too(knnext: Knnext, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 0, 10))
    said = knnext("build", "--codes", code=1, all_of_it=True)
    assert "the datastore with its codes takes" in said and f"({132 + 64 + 12} bytes a row)" in said


def test_room_is_asked_for_in_python(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnext.corpus import tokenize
    from knnext.datastore import DatastoreWriteError
    from knnext.datastore.build import build_datastore
    from knnext.lm.load import load_lm

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 0, 10))
    model, tokenizer = load_lm(folder / "model")
    text = tokenize([Document("a", "the quick brown fox")], tokenizer)
    with pytest.raises(DatastoreWriteError, match=r"needs .* bytes\) and the disk has 10 B"):
        build_datastore(model, tokenizer, text, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", ["tune", "eval", "search", "generate"])
def test_a_searchs_memory(command: str) -> None:
    words = [command, *MORE[command], "--query-batch", "7", "--chunk-bytes", "1MB"]
    args = build_parser().parse_args(
        [*words, "--resident-bytes", "0", *(["--model", "m"] if command != "tune" else [])]
    )
    assert (args.query_batch, args.chunk_bytes, args.resident_bytes) == (7, 1_000_000, 0)


def test_a_searchs_memory_reaches_the_index(
    knnext: Knnext, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnext.index import ExactIndex

    seen: list[dict[str, Any]] = []

    class Seen(ExactIndex):
        def __init__(self, store: Any, **options: Any) -> None:
            seen.append(options)
            super().__init__(store, **options)

    knnext("build")
    plain = knnext("search")
    monkeypatch.setattr("knnext.index.sharded_crew.ExactIndex", Seen)
    options = ["--query-batch", "2", "--chunk-bytes", "2KB", "--resident-bytes", "0"]
    assert knnext("search", *options) == plain
    assert seen[0].items() >= {"query_batch": 2, "chunk_bytes": 2000, "resident_bytes": 0}.items()
    said = knnext("search", "--index", "faiss", *options[2:4], code=1)
    assert "--chunk-bytes is for --index exact" in said
