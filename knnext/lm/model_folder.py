"""What lies in a model's folder, looked at before transformers opens it.

transformers says of a broken folder what it met last, often without a file's name, and fills
missing weights with random numbers. The files say it better: which is missing, cut short, or no
model at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from knnext.errors import MissingFileError, ModelError

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEXES = tuple(f"{name}.index.json" for name in _WEIGHTS)
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
    "sentencepiece.bpe.model", "source.spm", "spm.model",
)  # fmt: skip
_LFS = b"version https://git-lfs"


def check_folder(folder: Path, *, tokenizer: bool = True) -> None:
    """MissingFileError or ModelError where the folder holds no whole model and tokenizer.

    ``tokenizer=False``: where the tokenizer comes from elsewhere.
    """
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json) of the model {base!r}, and no model: "
            "give that as --model and this folder as --adapter (in Python: adapter=)"
        )
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"no language model in {folder}: {_lacking(folder, 'config.json')}")
    for path in _weight_files(folder):
        _check_weights(path)
    if tokenizer and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise MissingFileError(
            f"no tokenizer in {folder}: {_lacking(folder, 'tokenizer.json')}; "
            "tokenizer.save_pretrained(folder) writes it"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ModelError, with the path, where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object, but {type(found).__name__}")
    return found


def _lacking(folder: Path, name: str) -> str:
    there = sorted(path.name for path in folder.iterdir())
    if not there:
        return "the folder is empty"
    shown = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
    return f"{name} is missing (there: {shown})"


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read: one file, or the shards that an index names."""
    for whole, index in zip(_WEIGHTS, _INDEXES, strict=True):
        if (folder / whole).is_file():
            return [folder / whole]
        if not (folder / index).is_file():
            continue
        named = read_json(folder / index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise ModelError(f"{folder / index} names no files: it has no weight_map")
        shards = sorted({str(name) for name in named.values()})
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise MissingFileError(
                f"the weights in {folder} are not complete: {', '.join(missing[:3])} "
                f"({len(missing)} of {len(shards)} files that {index} names) not there"
            )
        return [folder / name for name in shards]
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; for a GGUF file give --gguf {ggufs[0]} (in Python: gguf=)" if ggufs else ""
    raise MissingFileError(f"no weights in {folder}: {_lacking(folder, _WEIGHTS[0])}{hint}")


def _check_weights(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(_LFS))
        if head == _LFS:
            raise ModelError(f"{path} is a Git LFS pointer and not the weights: run `git lfs pull`")
        if path.suffix != ".safetensors":
            return
        length = int.from_bytes(head[:8], "little")
        if size < 8 or 8 + length > size:
            raise ModelError(f"{path} is damaged or cut short: {size:,} bytes do not hold its head")
        file.seek(8)
        try:
            tensors = json.loads(file.read(length))
            ends = [t["data_offsets"][1] for n, t in tensors.items() if n != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ModelError(f"{path} is no safetensors file: its head cannot be read") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(
            f"{path} is damaged or cut short: it has {size:,} bytes, its head says {expected:,}"
        )
