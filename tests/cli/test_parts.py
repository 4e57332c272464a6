"""Builds that several processes share, from the command line: by number, by claims, by torchrun."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.cli import main
from knnext.datastore import Datastore
from tests.cli.test_cli import Run, folder, run
from tests.datastore.streams import check_same
from tests.launch import TORCHRUN, ended, processes

__all__ = ["folder", "run"]  # fixtures


def words_of(folder: Path, store: str, *more: str) -> list[str]:
    model, corpus = str(folder / "model"), str(folder / "corpus")
    return [
        *("build", str(folder / store), "--model", model, "--corpus", corpus),
        *("--device", "cpu", "--batch-size", "2", *more),
    ]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Datastore:
    assert main(words_of(folder, "whole", "--codes")) == 0
    return Datastore.open(folder / "whole")


def same_files(folder: Path, store: str, beside: str, *names: str) -> None:
    for name in names:
        one, other = (folder / f"{which}.{beside}" / name for which in (store, "whole"))
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("0/3", r"parts are counted from 1, got '0/3': .* task T makes part T \+ 1, here 1/3"),
        ("4/3", "the parts are 1/3 to 3/3, got '4/3'"),
        ("3", "a part and their number, counted from 1, as 3/64, got '3'"),
        ("x/3", "a whole number"),
        ("-1/3", "(a whole number|expected one argument)"),
        ("1/0", "a whole number of at least 1"),
    ],
)
@pytest.mark.parametrize("command", ["build", "index"])
def test_parts_that_there_are_not(
    capsys: pytest.CaptureFixture[str], command: str, given: str, said: str
) -> None:
    assert main([command, "s", "--part", given]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_store_its_codes_and_its_index_in_parts(
    folder: Path, run: Run, whole: Datastore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then all that reads a datastore reads this one, and gives what the other gives."""
    store = str(folder / "parts")
    run(*words_of(folder, "parts", "--part", "2/3"))
    assert "missing: 1, 3" in run("join", store, code=1)
    assert "--codes are of the whole" in run(
        *words_of(folder, "parts", "--part", "1/3", "--codes"), code=1
    )
    refused = run(*words_of(folder, "parts", "--part", "2/4"), code=1)
    assert "parts: datastore has 3, asked for 4" in refused
    assert "1 of 3 whole" in _said(capsys, "info", store)
    assert "--verify reads what is joined" in run("info", store, "--verify", code=1)
    assert run("info", f"{store}/part-00002", "--verify")["verified"]
    capsys.readouterr()
    assert main(words_of(folder, "parts", "--part", "1/3")) == 0
    assert "missing: 3" in capsys.readouterr().out
    facts = run(*words_of(folder, "parts"))  # as it was begun
    assert facts["format_version"] == 2 and len(facts["parts"]) == 3
    check_same(Datastore.open(store), whole)

    for kind, name in (("codes", "codes"), ("faiss", "index")):
        words = ["index", store, "--kind", kind]
        assert run(*words, "--part", "1/2")["joined"] is False
        assert "--overwrite is for one" in run(*words, "--part", "2/2", "--overwrite", code=1)
        assert "missing" in run("join", store, code=1)
        run(*words, "--part", "2/2")
        assert (folder / f"parts.{name}").is_dir()
    same_files(folder, "parts", "codes", "codes.bin", "stats.bin", "center.bin")
    assert run("join", store)["num_entries"] == len(whole)
    assert run("info", store, "--verify")["verified"]

    def evaluated(which: str) -> Any:
        words = ["eval", str(folder / which), "--model", str(folder / "model"), "--device", "cpu"]
        found = run(*words, "--temperature", "1", "--lmbda", "0.3", "--k", "8")
        return {k: v for k, v in found.items() if k not in ("seconds", "tokens_per_second")}

    assert evaluated("parts") == evaluated("whole")
    sample = Datastore.open(store).subsample(0.2, seed=3, path=folder / "sample")
    other = whole.subsample(0.2, seed=3)
    assert torch.equal(sample.keys[:], other.keys[:])


def _said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main([*words]) == 0
    return capsys.readouterr().out


def test_one_process_has_nothing_to_join(run: Run, whole: Datastore) -> None:
    assert "built by one process" in run("join", str(whole.path), code=1)
    assert "does not exist" in run("join", str(whole.path) + "-none", code=1)


@pytest.mark.slow
def test_torchrun_builds_what_one_process_builds(folder: Path, whole: Datastore) -> None:
    """Ranks without a process group; one says what came out. So with codes and index."""
    words = words_of(folder, "torchrun", "--codes")
    index = ["index", str(folder / "torchrun")]
    for command in (words, index):
        start = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "knnext", *command]
        with processes(start) as [process]:
            code, out, err = ended(process)
        assert code == 0, err
        assert out.count("finished") == (command is words)
    store = Datastore.open(folder / "torchrun")
    check_same(store, whole)
    assert store.meta.parts is not None and len(store.meta.parts) > 2
    same_files(folder, "torchrun", "codes", "codes.bin", "stats.bin", "center.bin")
    assert (folder / "torchrun.index" / "index.json").exists()


@pytest.mark.slow
def test_an_elastic_restart_goes_on(folder: Path, whole: Datastore) -> None:
    """kill -9 of a rank: torchrun starts all again, and what was whole is not built again."""
    store = folder / "elastic"
    words = words_of(folder, "elastic")
    start = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    with processes([*start, "-m", "knnext", *words]) as [process]:
        child = _first_child_that_writes(process.pid, store)
        if child is not None:
            os.kill(child, signal.SIGKILL)
        code, _, err = ended(process)
    assert code == 0, err
    check_same(Datastore.open(store), whole)


def _first_child_that_writes(parent: int, store: Path) -> int | None:
    """A process below ``parent`` that holds a file of a part open; None where all has ended."""
    while not (store / "meta.json").exists():
        for entry in Path("/proc").iterdir():
            try:
                status = (entry / "status").read_text()
                if f"PPid:\t{parent}\n" not in status:
                    continue
                if any("part-" in str(fd.readlink()) for fd in (entry / "fd").iterdir()):
                    return int(entry.name)
            except (OSError, ValueError):
                continue
    return None
