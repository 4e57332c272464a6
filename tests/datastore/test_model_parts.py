"""The parts of a model in a datastore: kept, handed on, and named where they differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knnext.datastore import Datastore, IncompatibleDatastoreError
from knnext.datastore.meta import model_differences

PLAIN = {"dtype": "float32", "weights": "w"}


def make(path: Path, model: dict[str, str] | None, revision: str = "r", **more: bool) -> Datastore:
    with Datastore.create(path, 2, model_revision=revision, model=model, **more) as store:
        store.append(torch.ones(3, 2), torch.arange(3))
    return store


@pytest.mark.parametrize(
    ("stored", "asked", "named"),
    [
        (PLAIN, {"dtype": "bfloat16", "weights": "v"}, ["dtype"]),
        (PLAIN, {"dtype": "float32", "weights": "v"}, ["weights"]),
        (PLAIN, {**PLAIN, "adapter": "a"}, ["adapter"]),
        (PLAIN, {"dtype": "float32", "weights": "v", "adapter": "merged a"}, ["adapter"]),
        (PLAIN, {"dtype": "float32", "weights": "v", "adapter": "a"}, ["adapter", "weights"]),
        (
            {**PLAIN, "quantization": "GGUF Q8_0"},
            {"dtype": "bfloat16", "weights": "v", "quantization": "GGUF Q4_1"},
            ["dtype", "quantization"],
        ),
        (
            {**PLAIN, "commit": "1"},
            {"dtype": "float32", "weights": "v", "commit": "2"},
            ["weights", "commit"],
        ),
        (None, PLAIN, []),
        (PLAIN, None, []),
        (PLAIN, PLAIN, []),
    ],
)
def test_which_parts_differ(
    stored: dict[str, str] | None, asked: dict[str, str] | None, named: list[str]
) -> None:
    said = model_differences(stored, asked)
    found = [line.removeprefix("the models differ in ").split(":")[0] for line in said.split("; ")]
    assert (found if said else []) == named


def test_parts_are_kept_and_handed_on(tmp_path: Path) -> None:
    make(tmp_path / "a", PLAIN)
    store = Datastore.open(tmp_path / "a")
    assert store.meta.model == PLAIN
    store.check_compatible(model_revision="r", model={"dtype": "other"})  # the revision decides
    with pytest.raises(IncompatibleDatastoreError, match=r"'r', want 'q'; .* differ in dtype"):
        store.check_compatible(model_revision="q", model={**PLAIN, "dtype": "float16"})
    merged = Datastore.merge([store, store], tmp_path / "merged")
    assert merged.meta.model == PLAIN


def test_what_is_not_known_decides_nothing(tmp_path: Path) -> None:
    """A build from before there were parts is gone on with; the file stays as it was."""
    make(tmp_path / "a", None)
    again = make(tmp_path / "a", PLAIN, resume=True)
    assert again.meta.model is None and again.num_entries == 6
    with pytest.raises(IncompatibleDatastoreError, match="model_revision: datastore has 'r'"):
        make(tmp_path / "a", PLAIN, revision="q", resume=True)
    make(tmp_path / "b", PLAIN)
    with pytest.raises(IncompatibleDatastoreError, match="differ in dtype"):
        make(tmp_path / "b", {**PLAIN, "dtype": "float16"}, revision="q", resume=True)


def test_parts_are_strings(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model: got 'dtype'"):
        make(tmp_path / "a", {"dtype": 3})  # type: ignore[dict-item]
