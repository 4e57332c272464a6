"""Commands that torchrun starts in several processes: one answer, one voice, and an end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.cli import main
from knnext.cli.parser import build_parser
from knnext.cli.ranks import EACH, LED, TOGETHER
from knnext.datastore import Datastore
from tests.cli.test_cli import COMMANDS, Run, folder, run
from tests.launch import TORCHRUN, ended, on_machines, on_processes, processes, two_machines

__all__ = ["folder", "run"]  # fixtures
MIXTURE = ("--temperature", "1", "--lmbda", "0.3", "--k", "32", "--batch-size", "8")


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: str, size: str = "2") -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)


def test_each_command_is_of_one_kind() -> None:
    assert not set(TOGETHER) & set(LED) and not set(TOGETHER + LED) & set(EACH)
    assert set(TOGETHER + LED + EACH) <= {*COMMANDS, "experiment", "index", "distill"}


@pytest.mark.parametrize("command", [*TOGETHER, *LED])
def test_commands_of_several_ranks_have_a_timeout(command: str) -> None:
    chosen = build_parser()._subparsers._group_actions[0].choices[command]  # type: ignore
    assert chosen.get_default("rank_timeout") == 1800
    words = {"search": ["s", "t", "--model", "m"], "generate": ["s", "t", "--model", "m"]}
    words |= {"experiment": ["list"]}
    args = build_parser().parse_args([command, *words.get(command, ["s"]), "--rank-timeout", "2.5"])
    assert args.rank_timeout == 2.5


@pytest.mark.parametrize("words", [["doctor"], ["experiment", "list"], ["eval"], ["--help"]])
def test_a_rank_beside_the_first_says_nothing_of_what_the_first_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    as_rank(monkeypatch, "1")
    code = main(words)
    assert code == (2 if words == ["eval"] else 0)  # the datastore is missing
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    as_rank(monkeypatch, "0")
    main(words)
    captured = capsys.readouterr()
    assert captured.out + captured.err


@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "")])
def test_an_environment_that_is_none_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, size: str
) -> None:
    as_rank(monkeypatch, rank, size)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("knnext doctor: RANK and WORLD_SIZE must be") and said.count("\n") == 1


# Processes


@pytest.fixture(scope="module")
def built(folder: Path) -> Path:
    """A copy of the corpus with its store, for commands that run beside each other."""
    words = ["build", str(folder / "ranks"), "--model", str(folder / "model"), "--device", "cpu"]
    assert main([*words, "--corpus", str(folder / "corpus")]) == 0
    return folder


def words_of(built: Path, command: str, *more: str) -> list[str]:
    words = ["knnext", command, str(built / "ranks"), *more]
    return [*words, "--model", str(built / "model"), "--device", "cpu"]


def same_but_for_times(found: str, wanted: dict[str, Any]) -> None:
    times = ("seconds", "tokens_per_second", "path", "picture", "replaced")
    one, other = (
        {k: v for k, v in d.items() if k not in times} for d in (json.loads(found), wanted)
    )
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "tune"])
def test_figures_under_torchrun_are_those_of_one_process(
    built: Path, run: Run, command: str, tmp_path: Path
) -> None:
    more = MIXTURE if command == "eval" else ("--k", "32", "--batch-size", "8", "--out")
    one = [str(tmp_path / "1")] if command == "tune" else []
    wanted = run(*words_of(built, command, *more, *one)[1:])
    two = [str(tmp_path / "2")] if command == "tune" else []
    words = words_of(built, command, *more, *two)
    start = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", *words, "--json"]
    with processes(start) as [process]:
        code, out, err = ended(process)
    assert code == 0, err
    same_but_for_times(out, wanted)
    assert err.count("tokens of 4 documents") <= 2  # of one rank alone
    if command == "tune":
        one, two = (json.loads((tmp_path / name).read_text()) for name in "12")
        assert one["nll"] == two["nll"]


@pytest.mark.slow
@pytest.mark.parametrize(("factory", "divided"), [("IVF4,SQ8", True), ("HNSW8", False)])
def test_one_faiss_index_serves_all_ranks(
    built: Path, run: Run, factory: str, divided: bool, tmp_path: Path
) -> None:
    """Each rank holds its rows of it, where it can be divided; the figures are those of one."""
    pytest.importorskip("faiss")
    place = ("--index-path", str(tmp_path / "index"))
    run("index", str(built / "ranks"), *place, "--factory", factory, "--nprobe", "2")
    words = words_of(built, "eval", *MIXTURE, *place, "--index", "faiss", "--rescore")
    wanted = run(*words[1:])
    start = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", *words, "--json"]
    with processes(start) as [process]:
        code, out, err = ended(process)
    assert code == 0, err
    same_but_for_times(out, wanted)
    assert ("rows on 2 ranks" in err) == divided and ("cannot be divided" in err) != divided
    words = words_of(built, "generate", "the key of", *MIXTURE[:-2], "--max-new-tokens", "3")
    words += [*place, "--index", "faiss"]
    wanted = run(*words[1:])
    with on_processes([*words, "--json"]) as [first, second]:
        code, out, err = ended(first)
        assert code == 0, err
        assert json.loads(out) == wanted
        assert ended(second) == (0, "", "")


@pytest.mark.slow
def test_a_text_is_continued_by_the_first_with_the_rows_of_all(built: Path, run: Run) -> None:
    words = words_of(built, "generate", "the key of", *MIXTURE[:-2], "--max-new-tokens", "4")
    wanted = run(*words[1:])
    with on_processes([*words, "--json"]) as [first, second]:
        code, out, err = ended(first)
        assert code == 0, err
        assert json.loads(out) == wanted
        assert ended(second) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_others_with_one_sentence(
    built: Path, number: signal.Signals, tmp_path: Path
) -> None:
    """What stands on disk is as it was, and nothing new lies there."""
    before = {path.name: path.read_bytes() for path in (built / "ranks").iterdir()}
    words = words_of(built, "eval", *MIXTURE, "--split", "train", "--allow-overlap")
    scores = tmp_path / "scores.npz"
    words += ["--save-scores", str(scores), "--rank-timeout", "20"]
    with on_processes(words) as [first, second]:
        assert first.stdout is not None
        for line in first.stdout:
            if "rows on 2 ranks" in line:  # both have opened their shards
                os.killpg(second.pid, number)
                break
        code, _, err = ended(first)
        assert code == 1, err
        cause = "one did not answer within 20 s" if number == signal.SIGSTOP else "one has gone"
        [said] = [line for line in err.splitlines() if "knnext" in line]
        assert said.startswith("knnext eval, rank 0 of 2: lost the other ranks") and cause in said
    assert not list(tmp_path.iterdir())
    assert before == {path.name: path.read_bytes() for path in (built / "ranks").iterdir()}


@pytest.mark.slow
def test_the_road_over_two_machines_is_that_of_one(built: Path, run: Run, tmp_path: Path) -> None:
    """Build with codes, each machine some parts; then eval, each with its share of the text."""
    model = ["--model", str(built / "model"), "--device", "cpu"]
    corpus = ["--corpus", str(built / "corpus"), "--batch-size", "8", "--codes"]
    one, two = tmp_path / "one", tmp_path / "two"
    run("build", str(one), *model, *corpus)
    wanted = run("eval", str(one), *model, *MIXTURE)
    with two_machines() as machines:
        with on_machines(machines, ["knnext", "build", str(two), *model, *corpus]) as begun:
            for process in begun:
                code, _, err = ended(process)
                assert code == 0, err
        stores = [Datastore.open(path) for path in (one, two)]
        assert len(stores[1].meta.parts or ()) > 1
        for name in ("keys", "values"):
            ours, theirs = (getattr(store, name)[0 : len(store)] for store in stores)
            assert torch.equal(ours, theirs)
        codes = [path.with_name(f"{path.name}.codes") / "codes.bin" for path in (one, two)]
        assert codes[0].read_bytes() == codes[1].read_bytes()
        words = ["knnext", "eval", str(two), *model, *MIXTURE, "--json"]
        with on_machines(machines, words) as [first, second]:
            code, out, err = ended(first)
            assert code == 0, err
            same_but_for_times(out, wanted)
            assert ended(second)[:2] == (0, "")
