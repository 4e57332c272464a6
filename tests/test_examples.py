"""The programs in examples/ do what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.launch import ROOT, TORCHRUN

EXAMPLES = ROOT / "examples"
TESTED = {"eval_loop.py", "own_model.py", "many_ranks.py", "harness_tasks.py"}


def run(*words: str) -> str:
    done = subprocess.run(
        words,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == TESTED


def test_eval_loop() -> None:
    out = run(sys.executable, str(EXAMPLES / "eval_loop.py"))
    base, mixed = map(float, re.findall(r"perplexity ([\d.]+)", out))
    assert base == pytest.approx(1000, abs=1) and mixed < 20


@pytest.mark.slow
def test_own_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from knnext.corpus import Document
    from knnext.lm.load import save_lm
    from knnext.lm.train import train_tokenizer

    tokenizer = train_tokenizer([Document("a", "some text to learn from\n" * 9)], vocab_size=258)
    config = transformers.GPT2Config(
        vocab_size=258, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0
    )
    save_lm(tmp_path / "model", transformers.GPT2LMHeadModel(config), tokenizer)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"text {number} of some " * 12)
    words = [str(tmp_path / name) for name in ("model", "texts", "store")]
    for _ in range(2):  # the second time all of it is there
        out = run(sys.executable, str(EXAMPLES / "own_model.py"), *words, "some", "--k", "16")
        before, after = map(float, re.findall(r"([\d.]+) -> ([\d.]+)", out)[0])
        assert after < 0.8 * before


@pytest.mark.slow
def test_many_ranks(tmp_path: Path) -> None:
    from knnext import Datastore

    with Datastore.create(tmp_path / "store", 16, torch.float16) as store:
        store.append(torch.randn(3000, 16), torch.zeros(3000, dtype=torch.int64))
    words = ["--standalone", "--nproc-per-node", "2", str(EXAMPLES / "many_ranks.py")]
    out = run(*TORCHRUN, *words, str(tmp_path / "store"))
    assert sorted(re.findall(r"rank (\d): 32 queries, the answers of one process: True", out)) == [
        "0",
        "1",
    ]


def test_harness_tasks(tmp_path: Path) -> None:
    """Items of held-out documents, as lm-evaluation-harness reads them."""
    from knnext.corpus import load_corpus

    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        lines = [f"line {line} of text {number} has some words" for line in range(90)]
        (texts / f"{number}.txt").write_text("\n".join(lines))
    words = ("--corpus", str(texts), "--items", "5")
    run(sys.executable, str(EXAMPLES / "harness_tasks.py"), str(tmp_path / "tasks"), *words)
    held_out = load_corpus(str(texts)).test
    for task in ("rolling", "next", "line"):
        file = tmp_path / "tasks" / f"texts_{task}.jsonl"
        items = [json.loads(line) for line in file.read_text().splitlines()]
        assert (
            0 < len(items) <= 5 and f"task: texts_{task}" in file.with_suffix(".yaml").read_text()
        )
        for item in items:
            text = item.get("text") or item["context"]
            text += f" {item['rest']}" if task == "line" else ""
            right = item["choices"][item["gold"]] if task == "next" else ""
            assert any(text + right in document.text for document in held_out)
    harness = pytest.importorskip("lm_eval.tasks")
    manager = harness.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    assert {"texts_rolling", "texts_next", "texts_line"} <= set(manager.all_tasks)


def test_harness_tasks_of_a_corpus_without_lines(tmp_path: Path) -> None:
    """A task of no items is one that the harness stops at, as at a comma in a task's name."""
    texts = tmp_path / "long, few"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"one long line of text {number} " * 90)
    words = ("--corpus", str(texts), "--items", "5")
    out = run(sys.executable, str(EXAMPLES / "harness_tasks.py"), str(tmp_path / "tasks"), *words)
    assert "long_few_next: left out, 4 lines of 20 to 100 characters" in out
    assert {file.name for file in (tmp_path / "tasks").iterdir()} == {
        "long_few_rolling.yaml",
        "long_few_rolling.jsonl",
    }
