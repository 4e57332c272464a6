"""Corpora from Hugging Face datasets, by name or from a folder that ``datasets`` understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knnext.corpus.decode import Reading
from knnext.corpus.documents import Document, unique_names
from knnext.corpus.files import documents_of_text
from knnext.errors import CorpusError, missing_package

_SPLIT_NAMES = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}
_LABELS = ("name", "title", "path", "url", "id")


def hub_splits(spec: str, reading: Reading) -> dict[str, list[Document]]:
    """The splits of ``NAME``, ``NAME:CONFIG`` or a folder written by ``save_to_disk``.

    A revision may follow the name: ``NAME@REVISION:CONFIG``. One row is one document, unless the
    rows are lines of one text, as WikiText's are (its ``= Title =`` headings stand in rows of
    their own): then the rows are joined and cut at the headings. No remote code is run.
    """
    loaded = _load(spec)
    result = {}
    for split, names in _SPLIT_NAMES.items():
        rows = next((loaded[name] for name in names if name in loaded), None)
        if rows is not None:
            result[split] = _documents(rows, split, spec, reading.text_column)
    if "train" not in result:
        raise CorpusError(f"dataset {spec!r} has splits {sorted(loaded)}; 'train' is wanted")
    return result


def absolute(spec: str) -> str:
    """``NAME``, or the folder that it is, from wherever it will be read again."""
    name, colon, config = spec.partition(":")
    for path, rest in ((spec, ""), (name, colon + config)):
        if path and Path(path).expanduser().exists():
            return f"{Path(path).expanduser().resolve()}{rest}"
    return spec


def _load(spec: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_package("corpora named 'hf:...' need", "datasets", "lm") from error
    path = Path(spec).expanduser()
    try:
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        name, _, config = spec.partition(":")
        name, _, revision = name.partition("@")
        return datasets.load_dataset(
            name, config or None, revision=revision or None, trust_remote_code=False
        )
    except Exception as error:  # datasets raises many kinds; each means the same to the user
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorpusError(f"dataset {spec!r} cannot be loaded: {reason}") from error


def _documents(rows: Any, split: str, spec: str, text_column: str) -> list[Document]:
    if text_column not in rows.column_names:
        raise CorpusError(
            f"dataset {spec!r} has columns {rows.column_names}; text_column={text_column!r} is none"
        )
    texts = ["" if text is None else str(text) for text in rows[text_column]]
    if texts and all(text.count("\n") <= 1 for text in texts):
        joined = "".join(text if text.endswith("\n") else text + "\n" for text in texts)
        pieces = documents_of_text("all", joined, whole=False)
        if len(pieces) > 1:
            return unique_names(pieces)
    label = next((name for name in _LABELS if name in rows.column_names), None)
    names = rows[label] if label else range(len(texts))
    prefix = "" if label else f"{split}/"
    documents = [Document(f"{prefix}{n}", t) for n, t in zip(names, texts, strict=True)]
    return unique_names([d for d in documents if d.text.strip()])
