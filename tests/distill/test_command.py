"""The command distill, on a datastore that the command build made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from knnext.cli import main
from knnext.corpus import load_corpus
from knnext.distill import DistillationData
from knnext.lm.load import save_lm
from knnext.lm.train import train_tokenizer
from tests.launch import ended, on_processes

pytest.importorskip("pyarrow")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of three splits, one text of it there twice, and a model with random weights."""
    folder = tmp_path_factory.mktemp("command")
    for split, count in (("train", 4), ("valid", 1), ("test", 1)):
        (folder / "corpus" / split).mkdir(parents=True)
        for number in range(count):
            words = [f"word{(7 * number + 3 * i * i) % 23}" for i in range(60)]
            (folder / "corpus" / split / f"{number}.txt").write_text(f"{split} " + " ".join(words))
    (folder / "corpus" / "train" / "copy.txt").write_text(
        (folder / "corpus" / "train" / "0.txt").read_text()
    )
    tokenizer = train_tokenizer(load_corpus(str(folder / "corpus")).train, 280)
    config = transformers.GPT2Config(
        vocab_size=280, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    save_lm(folder / "model", transformers.GPT2LMHeadModel(config).eval(), tokenizer)
    line = ["build", folder / "S", "--model", folder / "model", "--device", "cpu"]
    assert main([*map(str, line), "--corpus", str(folder / "corpus")]) == 0
    return folder


def test_from_a_datastore_to_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*more: str, code: int = 0) -> Any:
        model = ["--model", str(folder / "model"), "--device", "cpu"]
        line = ["distill", str(folder / "S"), *model, "--k", "8", "--json", *more]
        assert main(line) == code
        said = capsys.readouterr()
        return json.loads(said.out) if code == 0 else said.err

    out = str(folder / "D")
    assert "no temperature: run `knnext tune`" in run("--out", out, code=1)
    done = run("--out", out, "--temperature", "4", "--top", "3")
    assert done["excluded_documents"] == 5 and done["copies"] == 2 and done["shards"] == 1
    assert done["num_bytes"] < done["most_bytes"] or done["tokens"] < 4000
    data = DistillationData(out, 32)
    assert len(data.plan["shards"]) == 1 and data.num_tokens == done["tokens"]
    assert (data.plan["k"], data.plan["top"], data.plan["exclude"]) == (8, 3, "document")
    assert run("--out", out, "--temperature", "4", "--top", "3")["num_bytes"] == done["num_bytes"]
    assert "temperature: the data has 4.0" in run("--out", out, "--temperature", "5", code=1)
    test = run("--out", str(folder / "T"), "--temperature", "4", "--split", "test",
               "--exclude", "none")  # fmt: skip
    assert 0 < test["tokens"] < done["tokens"] and test["excluded_documents"] == 0
    row = run("--out", str(folder / "R"), "--temperature", "4", "--exclude", "row")
    assert row["tokens"] == done["tokens"]


@pytest.mark.slow
def test_processes_of_torchrun_divide_it(folder: Path) -> None:
    """Each takes files, one speaks, and the files are those of one process."""

    def words(out: str) -> list[str]:
        line = ["distill", str(folder / "S"), "--model", str(folder / "model"), "--out", out]
        more = ["--device", "cpu", "--k", "8", "--temperature", "4", "--shard-tokens", "40"]
        return [*line, *more, "--batch-size", "2", "--json"]

    assert main(words(str(folder / "alone"))) == 0
    with on_processes(["knnext", *words(str(folder / "both"))]) as ranks:
        results = [ended(rank) for rank in ranks]
    assert [code for code, _, _ in results] == [0, 0], results
    assert json.loads(results[0][1])["shards"] > 3 and results[1][1] == ""
    one, two = (
        {file.name: file.read_bytes() for file in (folder / name).iterdir()}
        for name in ("alone", "both")
    )
    assert one == two


def test_windows_are_as_they_are_asked_for(folder: Path) -> None:
    line = ["distill", str(folder / "S"), "--model", str(folder / "model"), "--device", "cpu"]
    line += ["--k", "8", "--temperature", "4", "--out", str(folder / "W"), "--stride", "8"]
    assert main([*line, "--full-last-window"]) == 0
    plan = json.loads((folder / "W" / "distill.json").read_text())
    assert (plan["full_last_window"], plan["stride"]) == (True, 8)
