"""Passes of the lab's models that ranks share: the bits of one process. The ranks are threads."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from knnext.datastore import Datastore
from knnext.evaluation.pieces import run_model
from knnext.experiments.lab import Lab, passes
from knnext.experiments.lab.cache import Cache
from knnext.experiments.lab.lm_training import score_text
from knnext.experiments.lab.presets import TINY
from knnext.index.sharded_crew import leading, serve
from knnext.lm.load import load_lm
from knnext.ranks import RankFailedError, Ranks
from tests.evaluation.test_shares import text_of
from tests.index.threads import PATIENCE, on_ranks
from tests.launch import TORCHRUN, ended, processes

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Of a few windows, and a model that has hardly been trained."""
    sizes = {"max_bytes": 60_000, "train_steps": 2, "entries": 1500, "valid_tokens": 200}
    preset = TINY.with_options(**sizes, test_tokens=300)
    return Lab(preset, tmp_path_factory.mktemp("lab"), say=lambda _line: None)


@pytest.fixture(autouse=True)
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers loads one model at a time; other ranks than these are processes."""
    lock = threading.Lock()

    def load(*words: Any, **options: Any) -> Any:
        with lock:
            return load_lm(*words, **options)

    monkeypatch.setattr("knnext.lm.load.load_lm", load)


def crew(lead: Any, size: int = 3) -> list[Any]:
    """What rank 0's `lead(ranks)` gives, and what each other complains of."""

    def work(group: Any, rank: int) -> Any:
        ranks = Ranks(group, timeout=PATIENCE)
        if rank == 0:
            with leading(ranks):
                return lead(ranks)
        said: list[str] = []
        serve(ranks, lambda error: said.append(str(error)))
        return said

    return on_ranks(size, work, errors=True)


@pytest.mark.parametrize("batch_size", [1, 4, 10_000])
def test_states_are_those_of_one_process(lab: Lab, batch_size: int) -> None:
    lm, text = lab.lm(), lab.text("test")
    windows = {"block_size": None, "stride": 20, "batch_size": batch_size}
    wanted = run_model(lm.model, text, "att", torch.float32, windows)

    def lead(ranks: Ranks) -> Any:
        once = passes.run_model(lab, lm.model, text, "att", windows, lm.place)
        in_memory = passes.run_model(lab, copy.deepcopy(lm.model), text, "att", windows)
        assert ranks.received > 0 or batch_size == 10_000  # one batch is one rank's
        return once, in_memory

    found, *said = crew(lead)
    assert said == [[], []]
    for passed in found:
        assert all(map(torch.equal, passed, wanted))
    assert not list(lab.cache.folder.glob("shared-*"))


def test_a_trained_copy_is_scored_by_all(lab: Lab) -> None:
    model, text = copy.deepcopy(lab.lm().model), text_of(300)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.25)
    wanted = score_text(lab, model, text)
    assert crew(lambda _: torch.equal(score_text(lab, model, text), wanted))[0]


def test_the_datastore_has_the_rows_of_one_process(lab: Lab, tmp_path: Path) -> None:
    lm, layers = lab.lm(), ("att", "ffn")
    one = lab.build_joined(tmp_path / "one", layers, lm)
    found, *said = crew(lambda _: passes.build_joined(lab, tmp_path / "all", layers, lm))
    assert said == [[], []]
    assert isinstance(found, Datastore) and len(found.meta.parts or ()) > 1
    for name in ("keys", "values"):
        ours, theirs = (getattr(store, name)[0 : len(one)] for store in (found, one))
        assert torch.equal(ours, theirs)
    assert found.document_names == one.document_names


def test_what_one_process_began_it_also_ends(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(Exception):
        pass

    def cut(*_: Any, **__: Any) -> None:
        raise Cut

    lm = lab.lm()
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Datastore, "append", cut)
        lab.build_joined(tmp_path, ("att",), lm)
    found, *said = crew(lambda _: passes.build_joined(lab, tmp_path, ("att",), lm))
    assert said == [[], []]
    assert found.meta.parts is None and len(found) == len(lab.text("store")) - 1


def test_a_rank_that_cannot_have_the_model_says_so_and_all_go_on(lab: Lab) -> None:
    lm, text = lab.lm(), text_of(300)
    windows = {"block_size": None, "stride": None, "batch_size": 4}

    def lead(_: Ranks) -> bool:
        nowhere = {"path": "/no/such/model"}
        with pytest.raises(RankFailedError, match=r"rank 1 of 3 failed in running the model"):
            passes.run_model(lab, lm.model, text, "att", windows, nowhere)
        broken = SimpleNamespace(cache=Cache(lab.cache.folder), tokenizer=lm.tokenizer)
        with pytest.raises(ValueError, match="key_layer"):
            passes.run_model(broken, lm.model, text, "nothing", windows, lm.place)  # type: ignore
        passes.run_model(lab, lm.model, text, "att", windows, lm.place)
        return True

    found, *said = crew(lead)
    assert found is True
    assert all("/no/such/model" in lines[0] and len(lines) == 2 for lines in said)


# Processes

_TIMES = ("seconds", "created", "versions")


def _figures(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in result.items() if name not in _TIMES}


@pytest.mark.slow
def test_experiments_under_torchrun_have_the_figures_of_one_process(tmp_path: Path) -> None:
    """Two that search and train on states, and two that train whole models."""
    names = ("representation", "clustering", "memorization", "soft-labels")
    words = ["knnext", "experiment", "all", "--preset", "tiny", "--max-bytes", "60000"]
    words += ["--train-steps", "20", "--entries", "1500", "--seeds", "0", "--steps", "5"]
    words += ["--valid-tokens", "150", "--test-tokens", "300"]
    words += ["--only", ",".join(names)]
    starts = (["-m"], [*TORCHRUN[1:], "--standalone", "--nproc-per-node", "2", "-m"])
    for number, start in enumerate(starts, 1):
        out = ["--out", str(tmp_path / str(number))]
        with processes([TORCHRUN[0], *start, *words, *out]) as [process]:
            code, _, err = ended(process)
        assert code == 0, err
    for name in names:
        one, two = (_figures(tmp_path / number / f"{name}.json") for number in "12")
        assert one == two, name
    stores = [Datastore.open(path) for path in (tmp_path / "2" / "cache").glob("datastores/*/att")]
    assert stores
