"""``index --kind codes`` and ``build --codes``: who makes them, who uses them, who says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.cli import main
from knnext.datastore import Datastore
from tests.index.test_codes import damage
from tests.index.test_exact import make_datastore


@pytest.fixture
def store(tmp_path: Path) -> Path:
    keys = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)).half()
    return Path(make_datastore(tmp_path / "S", keys).path)


def test_index_kind_codes(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def info() -> tuple[Any, str]:
        capsys.readouterr()
        assert main(["info", str(store), "--verify", "--json"]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), captured.err

    facts, said = info()
    assert "codes" not in facts and "no codes in S.codes (run `knnext index" in facts["search"]
    assert f"search      {facts['search']}" in said
    for _ in range(2):  # the second time they are there
        assert main(["index", str(store), "--kind", "codes", "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        want = {"path": str(store.with_name("S.codes")), "num_entries": 500}
        assert made == want | {"num_bytes": 500 * 28 + 64}
    facts, said = info()
    assert facts["codes"] == made and facts["verified"] is True
    assert "exact search: by eight-bit codes (S.codes), 13.73 KiB, resident" in said

    damage(store.with_name("S.codes") / "codes.bin")
    assert main(["info", str(store), "--verify"]) == 1
    assert "codes.bin is damaged" in capsys.readouterr().err
    assert main(["index", str(store), "--kind", "codes", "--overwrite"]) == 0
    assert info()[0]["codes"] == made


def test_codes_of_another_state_are_passed_over_and_said(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(store), "--kind", "codes"]) == 0
    with Datastore.create(store, 16, key_layer="att", vocab_size=97, resume=True) as growing:
        growing.append(torch.ones(3, 16), torch.zeros(3, dtype=torch.int32))
    capsys.readouterr()
    assert main(["info", str(store)]) == 0
    captured = capsys.readouterr()
    assert "exact search: over all keys" in captured.out
    assert "note: searching without codes" in captured.err and "500 rows, now 503" in captured.err
    assert main(["index", str(store), "--kind", "codes"]) == 0
    assert "num_entries  503" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option",
    [
        *(("--factory", "Flat"), ("--nprobe", "3"), ("--seed", "1"), ("--train-size", "9")),
        ("--index-path", "x"),
    ],
)
def test_what_is_of_faiss_is_refused(
    store: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(store), "--kind", "codes", *option]) == 1
    assert f"{option[0]} is for --kind faiss" in capsys.readouterr().err
    assert not store.with_name("S.codes").exists()
