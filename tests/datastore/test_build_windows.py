"""The windows of a build: what is chosen where nobody says, and documents read one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.datastore import IncompatibleDatastoreError, build_job
from knnext.datastore.build import build_datastore, settled
from knnext.lm.hidden_states import hidden_states
from knnext.lm.windows import Windows
from tests.datastore.test_build import files, text, tokenizer  # noqa: F401  fixtures
from tests.lm.tiny_models import tiny

SEPARATE: dict[str, Any] = {
    "block_size": 16,
    "stride": 12,
    "batch_size": 1,
    "separate_documents": True,
}


def test_documents_are_read_one_by_one(tokenizer: Any, text: Any, tmp_path: Path) -> None:  # noqa: F811
    store = build_datastore(tiny("gpt2"), tokenizer, text, tmp_path / "store", **SEPARATE)
    assert store.meta.origin["separate_documents"] is True
    assert store.values[0 : len(store)].tolist() == text.tokens[1:].tolist()
    batches = list(hidden_states(tiny("gpt2"), text, **SEPARATE))
    assert torch.equal(store.keys[0 : len(store)], torch.cat([b.keys for b in batches]))
    across = {**SEPARATE, "separate_documents": False}
    plain = build_datastore(tiny("gpt2"), tokenizer, text, tmp_path / "plain", **across)
    assert "separate_documents" not in plain.meta.origin
    assert not torch.equal(plain.keys[0 : len(store)], store.keys[0 : len(store)])


def test_stopped_or_in_parts_the_bytes_are_the_same(
    tokenizer: Any,  # noqa: F811
    text: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    model = tiny("gpt2")
    build_datastore(model, tokenizer, text, tmp_path / "whole", **SEPARATE)
    wanted = files(tmp_path / "whole")

    def breaking(*args: Any, **kwargs: Any) -> Iterator[Any]:
        stream = hidden_states(*args, **kwargs)
        batch = next(stream)
        batch.positions, batch.keys, batch.targets = (
            part[:50] for part in (batch.positions, batch.keys, batch.targets)
        )
        yield batch  # in the middle of what is given together
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_job, "hidden_states", breaking)
        build_datastore(model, tokenizer, text, tmp_path / "broken", **SEPARATE)
    build_datastore(model, tokenizer, text, tmp_path / "broken", **SEPARATE)
    assert files(tmp_path / "broken") == wanted
    joined = build_datastore(model, tokenizer, text, tmp_path / "parts", parts=2, **SEPARATE)
    whole = build_datastore(model, tokenizer, text, tmp_path / "whole", **SEPARATE)
    assert torch.equal(joined.keys[0 : len(whole)], whole.keys[0 : len(whole)])
    assert torch.equal(joined.document_offsets, whole.document_offsets)


@pytest.mark.parametrize("first", [True, False])
def test_going_on_the_other_way_is_refused_by_name(
    tokenizer: Any,  # noqa: F811
    text: Any,  # noqa: F811
    tmp_path: Path,
    first: bool,
) -> None:
    options = {**SEPARATE, "separate_documents": first}
    build_datastore(tiny("gpt2"), tokenizer, text, tmp_path / "store", **options)
    with pytest.raises(IncompatibleDatastoreError, match="separate_documents: datastore has"):
        options["separate_documents"] = not first
        build_datastore(tiny("gpt2"), tokenizer, text, tmp_path / "store", **options)


def test_each_token_is_read_one_and_a_third_times(tmp_path: Path) -> None:
    grid = settled(tiny("gpt2"), tmp_path / "none")
    assert (grid["block_size"], grid["stride"]) == (64, 48)
    assert Windows.over(100_000, grid["block_size"], grid["stride"]).reads == pytest.approx(
        4 / 3, abs=0.01
    )
    assert grid["batch_size"] == 128  # 8,192 tokens, where there is memory


def test_what_is_left_out_is_as_it_was_begun(tokenizer: Any, text: Any, tmp_path: Path) -> None:  # noqa: F811
    """Also of builds from when the usual stride was another, and with other memory free."""
    before = {"block_size": 64, "stride": 32, "batch_size": 8}
    build_datastore(tiny("gpt2"), tokenizer, text, tmp_path / "store", **before)
    kept = files(tmp_path / "store")
    again = build_datastore(tiny("gpt2"), tokenizer, text, tmp_path / "store")
    assert files(tmp_path / "store") == kept and again.meta.origin["stride"] == 32
    assert settled(tiny("gpt2"), tmp_path / "store") == before
    assert settled(tiny("gpt2"), tmp_path / "store", 32)["stride"] == 24
    with pytest.raises(IncompatibleDatastoreError, match="batch_size: datastore has 8, asked"):
        build_datastore(tiny("gpt2"), tokenizer, text, tmp_path / "store", batch_size=4)


def test_processes_agree_without_asking(tmp_path: Path, monkeypatch: Any) -> None:
    found = []
    for free in (1 << 20, 1 << 40):
        monkeypatch.setattr("knnext.lm.batching.free_memory", lambda _, free=free: free)
        found.append(settled(tiny("gpt2"), tmp_path / "none", alone=False))
    assert found[0] == found[1]


def test_a_window_of_nothing_is_refused(tmp_path: Path) -> None:
    for options in ({"block_size": 0}, {"stride": 0}, {"block_size": 8, "stride": 9}):
        with pytest.raises(ValueError, match=r"block_size must be|stride must be"):
            settled(tiny("gpt2"), tmp_path / "none", **options)


def test_the_origin_is_plain(tokenizer: Any, text: Any, tmp_path: Path) -> None:  # noqa: F811
    build_datastore(tiny("gpt2"), tokenizer, text, tmp_path / "store", **SEPARATE)
    origin = json.loads((tmp_path / "store" / "meta.json").read_text())["origin"]
    assert {k: origin[k] for k in SEPARATE} == SEPARATE
