"""Commands among other programs: closed, cut or ASCII streams, limits, files in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.cli import main
from knnext.cli.memory import is_out_of_memory, out_of_memory
from knnext.cli.session import device_of
from knnext.evaluation import StreamScores
from knnext.report.table import Row, results_table, text_table
from tests.index.stores import clustered, make_datastore

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore and the stored search of a text of three documents, from which much can run."""
    folder = tmp_path_factory.mktemp("manners")
    make_datastore(folder / "store", clustered(300))
    scored(30, 3).save(folder / "scores.npz")
    scored(60, 30).save(folder / "many.npz")
    return folder


def scored(count: int, documents: int) -> StreamScores:
    generator = torch.Generator().manual_seed(3)
    ids = (torch.arange(count) * documents // count).long()
    targets = torch.randint(0, 9, (count,), generator=generator)
    tokens = torch.randint(0, 9, (count, 8), generator=generator).int()
    tokens[0] = 10  # no neighbor stands for this target
    return StreamScores(
        log_p_lm=-3 * torch.rand(count, generator=generator) - 1,
        targets=targets,
        document_ids=ids,
        ends_document=torch.zeros(count, dtype=torch.bool),
        distances=torch.rand(count, 8, generator=generator).sort(1).values,
        tokens=tokens,
        num_words=ids.bincount(),
        num_bytes=5 * ids.bincount(),
        document_names=[f"d{i}" for i in range(documents)],
    )


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash; `knnext` in it is the command."""
    function = f'knnext() {{ "{sys.executable}" -m knnext "$@"; }}\n'
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "-c", function + line], cwd=cwd, env=env, capture_output=True)


EVAL = "knnext eval store --scores scores.npz --temperature 1 --lmbda 0.3"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_ends_a_command(folder: Path, encoding: str) -> None:
    done = shell(f"{EVAL} && printf '\\200' > x", folder, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    text = done.stdout.decode(encoding)
    assert "lmbda" in text and "mixture" in text and "\\u" not in text


def test_characters_that_the_stream_has_not_are_spelled(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii", errors="knnext") as file:
        file.write("−5 – λ … ⏎ é \udc80 日")
    assert (tmp_path / "out").read_text() == "-5 - lmbda ... \\n \\xe9 \\udc80 \\u65e5"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code"),
    [
        (f"{EVAL} >&-", 0),
        (f"{EVAL} --json >&-", 0),
        (f"{EVAL} <&-", 0),
        (f"{EVAL} <&- >&- 2>&-", 0),
        ("knnext info none <&- >&- 2>&-", 1),
        ("knnext info store >&- && test ! -s store/meta.json.part", 0),
    ],
)
def test_closed_streams(folder: Path, line: str, code: int) -> None:
    done = shell(line, folder)
    said = b"" if "--json" not in line else done.stderr  # words for people go there
    assert done.returncode == code and done.stderr == said, done.stderr
    assert b"Traceback" not in said and b"knnext eval:" not in said


@pytest.mark.slow
@pytest.mark.parametrize("words", ["info store", "info store --json", "--help", "doctor"])
def test_a_reader_that_goes_is_no_failure(folder: Path, words: str) -> None:
    done = shell(f"knnext {words} | true; echo ${{PIPESTATUS[0]}}", folder)
    assert done.stdout.split()[-1] in (b"0", b"141")
    said = b"" if "--json" not in words else done.stderr  # words for people go there
    assert done.stderr == said and b"Traceback" not in said and b"knnext info:" not in said


@pytest.mark.slow
def test_a_full_stdout_is_said(folder: Path) -> None:
    done = shell("knnext info store > /dev/full", folder)
    assert done.returncode == 1
    assert done.stderr == b"knnext: stdout: No space left on device\n"


# Devices, seeds, memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("command", ["build", "eval", "search"])
def test_a_gpu_that_is_not_there(
    folder: Path, device: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"build": ["--corpus", "stdlib"], "search": ["text"], "eval": []}[command]
    mixture = ["--temperature", "1", "--lmbda", "0.5"] if command == "eval" else []
    store = str(folder / ("new" if command == "build" else "store"))
    model = ["--model", str(folder / "no model"), "--device", device]
    assert main([command, store, *words, *model, *mixture]) == 1
    err = capsys.readouterr().err
    assert f"--device {device}: " in err and "doctor" in err and err.count("\n") == 1


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "7 7"])
def test_what_is_no_device(device: str) -> None:
    from argparse import Namespace

    if device:
        with pytest.raises(ValueError, match="--device must be such as"):
            device_of(Namespace(device=device))


@pytest.mark.parametrize("seed", ["12345678901234567890", "-1", "1.5", "x", str(2**63)])
@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--seed"],
        ["index", "store", "--seed"],
        ["generate", "store", "text", "--model", "m", "--seed"],
        ["build", "store", "--model", "m", "--corpus", "c", "--split-seed"],
        ["experiment", "all", "--seeds"],
    ],
)
def test_seeds_of_any_length(
    words: list[str], seed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, seed]) == 2
    err = capsys.readouterr().err
    assert "2**63 - 1" in err and seed in err and err.count("\n") == 1


def test_a_seed_that_faiss_cannot_keep(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    assert main(["index", str(folder / "store"), "--seed", str(2**40)]) == 1
    assert "seed must be" in capsys.readouterr().err and not (folder / "store.index").exists()


MEMORY = [
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("can't allocate memory: you tried to allocate 4096000000000 bytes."),
    RuntimeError("std::bad_alloc"),
    ImportError("libx.so: failed to map segment from shared object"),
    MemoryError("Unable to allocate 1. GiB for an array"),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda e: type(e).__name__)
def test_out_of_memory_in_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("out of memory is a word"))
    monkeypatch.setattr("knnext.cli.memory._limit", lambda: 3 << 30)
    said = out_of_memory(" ".join(str(error).split()))
    assert said.startswith("out of memory") and "3.00 GiB" in said and "ulimit -v" in said
    monkeypatch.setattr("knnext.cli.memory._limit", lambda: None)
    assert "ulimit" not in out_of_memory("x")


# Files


def test_outputs_are_tried_before_the_work(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(StreamScores, "load", work)
    monkeypatch.setattr("knnext.cli.evaluate.open_model", work)
    store, missing = str(folder / "store"), str(tmp_path / "none" / "a")
    mixture = ["--temperature", "1", "--lmbda", "0.5"]
    kept = str(folder / "scores.npz")
    for words, named in (
        (["tune", store, "--model", "m", "--out", missing], missing),
        (["tune", store, "--model", "m", "--save-scores", missing], missing),
        (["tune", store, "--model", "m", "--out", str(tmp_path)], str(tmp_path)),
        (["tune", store, "--scores", kept, "--out", kept], "written over"),
        (["eval", store, *mixture, "--model", "m", "--save-scores", missing], missing),
        (["eval", store, *mixture, "--model", "m", "--token-log", missing + ".jsonl"], missing),
        (["eval", store, *mixture, "--model", "m", "--token-log", "log.txt"], ".parquet or .jsonl"),
        (["eval", store, *mixture, "--scores", kept, "--save-scores", kept], "written over"),
    ):
        assert main(words) == 1, words
        assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def tuned(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    start = ["tune", str(folder / "store"), "--out", str(out), "--json", "--scores"]
    capsys.readouterr()
    assert main([*start, str(folder / "scores.npz"), *words]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_tune_keeps_what_it_replaces(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "fit.json"
    first, said = tuned(folder, out, capsys)
    assert first["replaced"] is None and "replaced" not in said
    before, picture = out.read_bytes(), (tmp_path / "fit.png").read_bytes()
    # The same fit again replaces nothing.
    assert tuned(folder, out, capsys)[0]["replaced"] is None
    coarse, said = tuned(folder, out, capsys, "--temperatures", "90,100", "--lmbdas", "0.8,0.9")
    assert coarse["perplexity"] > first["perplexity"]
    assert coarse["replaced"] == str(tmp_path / "fit.1.json") and "fit.1.json" in said
    assert "lower perplexity on the same text" in said and "30 tokens, k 8" in said
    kept = json.loads((tmp_path / "fit.1.json").read_text())
    assert {**kept, "seconds": 0} == {**json.loads(before), "seconds": 0}
    assert (tmp_path / "fit.1.png").read_bytes() == picture
    # The next is kept too, and a better fit is not lamented.
    fine, said = tuned(folder, out, capsys)
    assert fine["replaced"] == str(tmp_path / "fit.2.json") and "lower perplexity" not in said
    out.write_text("broken")
    assert tuned(folder, out, capsys)[0]["replaced"] == str(tmp_path / "fit.3.json")
    assert (tmp_path / "fit.3.json").read_text() == "broken"


def test_a_picture_never_takes_the_fits_place(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = tuned(folder, tmp_path / "fit.png", capsys)
    assert json.loads((tmp_path / "fit.png").read_text())["lmbda"] == result["lmbda"]


# What tables say


def test_few_documents_are_marked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = ["--temperature", "1", "--lmbda", "0.3", "--scores"]
    for name, few in (("scores.npz", True), ("many.npz", False)):
        assert main(["eval", str(folder / "store"), *mixture, str(folder / name)]) == 0
        text = capsys.readouterr().out
        assert ("]*" in text) == few and ("* from 3 documents" in text) == few
        assert main(["eval", str(folder / "store"), *mixture, str(folder / name), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["few_documents"] is few
        # And why the neighbors alone have no perplexity.
        assert "no neighbor stands for" in text and "inf" in text


@pytest.mark.parametrize(("documents", "mark"), [(2, True), (19, True), (20, False), (None, False)])
def test_marks_in_both_tables(documents: int | None, mark: bool) -> None:
    row = Row("a", 12.0, (11.0, 13.0), -0.1, (-0.2, 0.0), num_documents=documents)
    for table in (text_table([row]), results_table([row])):
        assert (f"* from {documents} documents" in table) == mark
        assert table.count("13.0]*" if "]" in table else "13.0*") == int(mark)
    # Without an interval there is nothing to mark.
    alone = Row("a", 12.0, (float("nan"), float("nan")), num_documents=1)
    assert "*" not in text_table([alone])


@pytest.mark.parametrize("command", ["eval", "build", "search", "plan"])
def test_an_unknown_option_is_its_commands_error(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "eval": ["s", "--model", "m"],
        "build": ["s", "--model", "m", "--corpus", "c"],
        "search": ["s", "text", "--model", "m"],
        "plan": ["--tokens", "5"],
    }
    assert main([command, *words[command], "--temprature", "3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"knnext {command}: unrecognized arguments: --temprature 3")
    assert said.endswith(f"see knnext {command} --help\n") and said.count("\n") == 1
