"""Commands on some files of a datastore: searched by FAISS where that suffices, else refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knnext.cli import main
from knnext.corpus import Document, tokenize
from knnext.datastore import Datastore
from knnext.datastore.build import build_datastore
from knnext.hub import open_partial
from knnext.index import FaissIndex
from knnext.lm.load import save_lm
from knnext.lm.train import train_tokenizer

pytest.importorskip("faiss")
transformers = pytest.importorskip("transformers")
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """S, a datastore with an index, and T, which is what a pull of all but its keys leaves."""
    folder = tmp_path_factory.mktemp("partial")
    documents = [
        Document(f"{n}.txt", " ".join(f"word{(7 * n + 3 * i * i) % 23}" for i in range(60)))
        for n in range(4)
    ]
    for split in ("train", "valid", "test"):
        (folder / "text" / split).mkdir(parents=True)
        text = f"{split} " + " ".join(f"word{5 * i % 23}" for i in range(60))
        (folder / "text" / split / "other.txt").write_text(text)
    tokenizer = train_tokenizer(documents, 280)
    config = transformers.GPT2Config(
        vocab_size=280, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    save_lm(folder / "model", model, tokenizer)
    store = build_datastore(model, tokenizer, tokenize(documents, tokenizer), folder / "S")
    FaissIndex.build(store, factory="Flat")
    for name in ("T", "values"):
        shutil.copytree(folder / "S", folder / name)
        (folder / name / "meta.json").rename(folder / name / "partial.json")
        (folder / name / "keys-00000.bin").unlink()
    (folder / "values" / "document-names.jsonl").unlink()
    shutil.copytree(folder / "S.index", folder / "T.index")
    return folder


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(command: str, store: str, *words: str, code: int = 0) -> Any:
        capsys.readouterr()
        line = [command, str(folder / store), *words, "--json"]
        assert main(line) == code, capsys.readouterr().err
        said = capsys.readouterr()
        return said.err if code else json.loads(said.out)

    return run


def model_of(folder: Path) -> list[str]:
    return ["--model", str(folder / "model"), "--device", "cpu", "--index", "faiss"]


MIX = ["--temperature", "0.5", "--lmbda", "0.4", "--k", "8"]


def test_searches_by_faiss_need_no_keys(folder: Path, run: Run) -> None:
    model = model_of(folder)
    text = ["--corpus", str(folder / "text"), "--split", "test"]
    for command, words in (
        ("search", ["word3 word9", *model, "--k", "4"]),
        ("generate", ["word3 word9", *model, *MIX, "--max-new-tokens", "4"]),
        ("eval", [*model, *MIX, *text]),
    ):
        found, wanted = run(command, "T", *words), run(command, "S", *words)
        for part in (found, wanted):
            for name in [n for n in part if "seconds" in n or "datastore" in n]:
                del part[name]
        assert _plain(found) == _plain(wanted)
    distilled = [*model, "--k", "8", "--temperature", "1", *text, "--exclude", "none"]
    for store in ("S", "T"):
        run("distill", store, *distilled, "--out", str(folder / f"{store}.distilled"))
    one, two = (
        (folder / f"{store}.distilled" / "tokens-00000.parquet").read_bytes() for store in "ST"
    )
    assert one == two


def _plain(found: Any) -> Any:
    """Without times and places, which differ."""
    if isinstance(found, dict):
        kept = {
            n: v for n, v in found.items() if not ("second" in n or "speed" in n or "path" in n)
        }
        return {name: _plain(value) for name, value in kept.items()}
    return [_plain(one) for one in found] if isinstance(found, list) else found


def test_info_tells_what_is_missing(folder: Path, run: Run, capsys: Any) -> None:
    facts = run("info", "T")
    assert facts["lacking"] == ["keys"] and facts["rows"] == run("info", "S")["rows"]
    assert run("info", "values")["lacking"] == ["keys", "documents"]
    assert run("info", "S")["lacking"] == []
    assert main(["info", str(folder / "T")]) == 0
    said = capsys.readouterr().out
    assert "some of its files, without keys: `knnext pull` fetches the rest" in said
    assert f"fingerprint {Datastore.open(folder / 'S').fingerprint}\n" in said
    assert "--verify reads a whole datastore" in run("info", "T", "--verify", code=1)
    assert "without keys" in open_partial(folder / "T").describe()
    assert "finished" in Datastore.open(folder / "S").describe()


def test_what_needs_more_says_so(folder: Path, run: Run, tmp_path: Path) -> None:
    model = model_of(folder)
    exact = [*model[:-1], "exact"]
    for command, store, words in (
        ("search", "T", ["word3", *exact, "--k", "4"]),
        ("search", "T", ["word3", *model, "--k", "4", "--rescore"]),
        ("search", "values", ["word3", *model, "--k", "4"]),
        ("eval", "T", [*exact, *MIX]),
        ("generate", "T", ["word3", *exact, *MIX]),
        ("distill", "T", [*exact, "--out", str(tmp_path / "D"), "--temperature", "1"]),
        ("index", "T", []),
        ("index", "T", ["--kind", "codes"]),
        ("export", "T", [str(tmp_path / "E"), "--format", "npy"]),
        ("push", "T", ["org/name"]),
        ("delete", "T", ["--documents", "0.txt"]),
        ("compact", "T", []),
    ):
        said = run(command, store, *words, code=1)
        assert "holds some files of a datastore" in said and "`knnext pull`" in said, command
        assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
