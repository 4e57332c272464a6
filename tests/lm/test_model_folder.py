"""Folders that are no whole model are refused in a line that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from knnext.lm.load import load_lm

pytest.importorskip("transformers")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_head(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"notajson")


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 0")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def adapter(folder: Path) -> None:
    empty(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "big/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{'a': 1}")


def t5(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')


def marian(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "marian"}')


def vision(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (empty, FileNotFoundError, "the folder is empty"),
        (cut_short, ValueError, r"model\.safetensors is damaged or cut short"),
        (cut_in_head, ValueError, r"model\.safetensors is damaged or cut short"),
        (no_safetensors, ValueError, r"model\.safetensors is no safetensors file"),
        (lfs_pointer, ValueError, r"model\.safetensors is a Git LFS pointer"),
        (missing_shard, FileNotFoundError, r"model-00002-of-00002\.safetensors \(1 of 2 files"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            FileNotFoundError,
            "no weights in .*there: ",
        ),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json is missing"),
        (no_tokenizer, FileNotFoundError, r"no tokenizer in .*tokenizer\.json is missing"),
        (adapter, ValueError, "an adapter .*'big/base'.*--adapter"),
        (bad_config, ValueError, r"config\.json is not JSON"),
        (t5, ValueError, "t5 is an encoder-decoder.*causal"),
        (marian, ValueError, "marian is an encoder-decoder.*causal"),
        (vision, ValueError, "type 'vit'.*not know as a causal"),
    ],
)
def test_a_folder_that_is_no_model_says_why(
    change: Callable[[Path], None],
    kind: type[Exception],
    message: str,
    model_folder: Callable[[str], Path],
) -> None:
    folder = model_folder("llama")
    change(folder)
    with pytest.raises(kind, match=message) as error:
        load_lm(folder)
    assert str(folder) in str(error.value) or "encoder-decoder" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
