"""The demo in a tiny form: what it leaves, takes up again and refuses."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnext.cli import main
from knnext.cli.parser import build_parser
from knnext.corpus import TokenizedDocuments, take_documents
from knnext.datastore import Datastore
from knnext.demo import Demo, run_demo
from knnext.demo.config import EXACT, FAISS, RESCORED, DemoConfig, DemoError
from knnext.demo.results import title
from knnext.index import ExactIndex, StoredCodes
from knnext.index.faiss_build import faiss_recipe
from knnext.report import Row

TINY = {"train_seconds": 4.0, "entries": 20_000, "valid_tokens": 400, "test_tokens": 600, "k": 64}


def stream(lengths: list[int]) -> TokenizedDocuments:
    offsets = np.cumsum([0, *lengths])
    counts = np.asarray(lengths, dtype=np.int64)
    return TokenizedDocuments(
        np.arange(offsets[-1], dtype=np.int32),
        offsets,
        [f"d{i}" for i in range(len(lengths))],
        10 * counts,
        100 * counts,
    )


def test_take_documents_keeps_whole_documents_in_order() -> None:
    text = stream([5, 50, 7, 9, 6, 8])
    taken = take_documents(text, 20)
    assert len(taken) <= 20 and taken.num_documents >= 2
    positions = [text.names.index(name) for name in taken.names]
    assert positions == sorted(positions)
    wanted = [
        text.tokens[text.document_offsets[i] : text.document_offsets[i + 1]] for i in positions
    ]
    assert taken.tokens.tolist() == np.concatenate(wanted).tolist()
    assert taken.num_words.tolist() == text.num_words[positions].tolist()
    assert np.diff(taken.document_offsets).tolist() == [len(w) for w in wanted]
    # What fits in less is part of what fits in more.
    assert set(take_documents(text, 12).names) <= set(taken.names) | {"d1"}


def test_take_documents_takes_all_that_fit() -> None:
    text = stream([5, 6, 7])
    assert take_documents(text, 18).tokens.tolist() == text.tokens.tolist()


def test_take_documents_cuts_the_only_one() -> None:
    taken = take_documents(stream([100]), 25)
    assert taken.tokens.tolist() == list(range(25))
    assert taken.num_words.tolist() == [250] and taken.num_bytes.tolist() == [2500]


@pytest.mark.parametrize(
    ("num_entries", "factory"),
    [(500_000, "IVF1024,PQ16"), (20_000, "IVF512,PQ16"), (9_000, None), (3, None)],
)
def test_faiss_recipe(num_entries: int, factory: str | None) -> None:
    found, rows = faiss_recipe(num_entries, 128)
    assert found == factory
    if found is not None and rows is not None:
        lists = int(re.findall(r"\d+", found)[0])
        assert 39 * lists <= rows <= num_entries


@pytest.mark.parametrize("name", ["entries", "k", "train_seconds", "test_tokens"])
def test_bad_settings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        DemoConfig(**{name: 0})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(DemoError, match="holds no demo"):
        run_demo(DemoConfig(), tmp_path, fresh=True, say=lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_fit_at_the_edge_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    lines: list[str] = []
    edges = {EXACT: ("highest temperature",), FAISS: ()}
    monkeypatch.setattr("knnext.evaluation.tune.tune", lambda e: SimpleNamespace(edges=e))
    Demo(DemoConfig(), tmp_path, lines.append)._tune(edges)  # type: ignore[arg-type]
    notes = [line.strip() for line in lines if "note:" in line]
    assert len(notes) == 1 and notes[0].startswith(EXACT) and "highest temperature" in notes[0]


@pytest.mark.parametrize(
    ("base", "mixed", "interval", "words"),
    [
        (1976.8, 778.1, (-0.65, -0.56), "Neighbors take test perplexity from 1,977 to 778"),
        (14.49, 13.22, (-0.13, -0.05), "Neighbors take test perplexity from 14.5 to 13.2"),
        (14.49, 15.0, (0.01, 0.05), "Neighbors bring test perplexity from 14.5 to 15.0"),
        (120.2, 119.9, (-0.004, -0.001), "Neighbors take test perplexity from 120.20 to 119.90"),
        (14.49, 14.3, (-0.03, 0.01), "not certain here: 14.5 without them, 14.3 with them"),
        (14.49, 14.3, (math.nan, math.nan), "not certain here"),
        (14.49, 14.3, None, "not certain here"),
        (9.0, 9.0, (0.0, 0.0), "not certain here: 9.000 without them, 9.000 with them"),
    ],
)
def test_the_title_says_no_more_than_its_interval(
    base: float, mixed: float, interval: tuple[float, float] | None, words: str
) -> None:
    change = mixed / base - 1
    found = title(Row("a", base, (1.0, 2.0)), Row("b", mixed, (1.0, 2.0), change, interval))
    assert words in found


class Killed(Exception):
    pass


@pytest.mark.slow
def test_demo_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("faiss")
    from knnext import demo

    out, lines = tmp_path / "demo", []
    config = DemoConfig(**TINY)

    # Broken off after training: what is there is kept.
    def kill(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(demo.Demo, "_index", kill)
        run_demo(config, out, say=lines.append)
    trained = (out / "model" / "model.safetensors").stat().st_mtime_ns
    before = len(lines)
    results = run_demo(config, out, say=lines.append)
    steps = re.findall(r"^  \[(\d+)/(\d+)\]", "\n".join(lines[before:]), flags=re.MULTILINE)
    count = demo.NUM_STEPS
    assert steps == [(str(number), str(count)) for number in range(1, count + 1)]
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == trained

    names = [row["name"] for row in results["rows"]]
    assert names == ["base LM", EXACT, FAISS, RESCORED]
    base, exact = results["rows"][0], results["rows"][1]
    assert exact["perplexity"] == results["evaluations"][EXACT]["mixture"]["token"]
    assert exact["change"] == pytest.approx(exact["perplexity"] / base["perplexity"] - 1)
    for row in results["rows"][1:]:
        assert row["perplexity"] < 1.05 * base["perplexity"]
        assert row["temperature"] == results["tuning"][row["name"]]["temperature"]
        assert row["tokens_per_second"] > 0 and row["num_bytes"] > 0
    for name in results["files"]:
        assert (out / name).stat().st_size > 1000
    assert (out / "report.html").stat().st_size < 2_000_000
    shown = "\n".join(lines)
    assert "95 %" in shown and "Where the neighbors helped most" in shown and "report.html" in shown

    assert "Done in " in shown

    # The exact search went by codes, which the other commands find too.
    store = Datastore.open(out / "datastore")
    codes = StoredCodes.open(store)
    assert codes.path == (out / "datastore.codes").resolve()
    keys_and_values = sum(
        file.num_bytes for file in store.meta.files() if "document" not in file.file
    )
    assert exact["num_bytes"] == keys_and_values + codes.nbytes
    assert "by eight-bit codes" in ExactIndex(store).describe()

    # The fit of the exact search lies where the other commands look for it, and they are named.
    fit = json.loads((out / "datastore.tuning.json").read_text())
    assert fit["k"] == 64 and fit["index"] == "exact" and fit["nprobe"] is None
    assert fit["lmbda"] == results["tuning"][EXACT]["lmbda"]
    tries = lines[lines.index("To try next:") + 1 :]
    assert len(tries) == 3
    for line in tries:
        words = shlex.split(line)
        words = words[words.index("knnext") + 1 :]
        build_parser().parse_args(words)
        if words[0] != "eval":  # reads all of the standard library's test split
            assert main([*words, "--device", "cpu"]) == 0, line

    # A finished demo is shown again and not run again.
    del lines[:]
    stamp = (out / "results.json").stat().st_mtime_ns
    assert run_demo(config, out, say=lines.append) == json.loads((out / "results.json").read_text())
    assert (out / "results.json").stat().st_mtime_ns == stamp
    assert "Done in" not in "\n".join(lines) and "The run that made them took" in "\n".join(lines)
    with pytest.raises(DemoError, match="k 64, not 65"):
        run_demo(DemoConfig(**{**TINY, "k": 65}), out, say=lines.append)
