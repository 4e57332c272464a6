"""Text in, token streams out: ``load_corpus`` and ``tokenize``."""

from __future__ import annotations

from pathlib import Path

from knnext.corpus.documents import (
    SPLITS,
    Corpus,
    CorpusError,
    Document,
    cap_bytes,
    split_by_hash,
)
from knnext.corpus.tokenized import (
    TokenizedDocuments,
    separator_token,
    take_documents,
    tokenize,
)

__all__ = [
    "Corpus",
    "CorpusError",
    "Document",
    "TokenizedDocuments",
    "load_corpus",
    "separator_token",
    "take_documents",
    "tokenize",
]


def load_corpus(
    spec: str, *, max_bytes: int | None = None, seed: int = 0, text_column: str = "text"
) -> Corpus:
    """Reads a corpus and its train, valid and test documents.

    ``spec``: ``"stdlib"`` (the running Python's own sources and help topics), a text file, a
    folder, or ``"hf:NAME[@REVISION][:CONFIG]"``. ``max_bytes`` caps the train split, by whole
    documents chosen by hash. ``seed`` moves that choice, and the split where the corpus has none
    of its own. A split that is missing beside a train split is taken out of train by hash.
    Raises CorpusError (a ValueError) for what cannot be found, read or divided.
    """
    splits = _read_splits(spec, seed, text_column)
    missing = tuple(name for name in SPLITS if name not in splits)
    if missing:
        # In this order: train's share is given away, the splits that exist stay as they are.
        splits.update(split_by_hash(splits["train"], seed, into=("train", *missing)))
    empty = [name for name in SPLITS if not splits[name]]
    if empty:
        count = sum(map(len, splits.values()))
        raise CorpusError(
            f"corpus {spec!r} has {count} documents and none for {', '.join(empty)}; give more "
            "documents, or files named train, valid and test"
        )
    if max_bytes is not None:
        splits["train"] = cap_bytes(splits["train"], max_bytes, seed)
    return Corpus(spec, splits["train"], splits["valid"], splits["test"])


def _read_splits(spec: str, seed: int, text_column: str) -> dict[str, list[Document]]:
    if not isinstance(spec, str) or not spec:
        raise TypeError(f"spec must be a non-empty string, got {spec!r}")
    if spec == "stdlib":
        from knnext.corpus.stdlib import stdlib_documents

        return split_by_hash(stdlib_documents(), seed)
    if spec.startswith("hf:"):
        from knnext.corpus.hub import hub_splits

        return hub_splits(spec[len("hf:") :], text_column)
    return _read_path(spec, seed, text_column)


def _read_path(spec: str, seed: int, text_column: str) -> dict[str, list[Document]]:
    from knnext.corpus.files import file_documents, folder_splits

    path = Path(spec).expanduser()
    if path.is_dir():
        splits = folder_splits(path, text_column)
    elif path.is_file():
        splits = {"all": file_documents(path, text_column)}
    else:
        raise CorpusError(
            f"corpus {spec!r} is no file or folder; wanted is a path, 'stdlib', or "
            "'hf:NAME[:CONFIG]' for a Hugging Face dataset"
        )
    return split_by_hash(splits["all"], seed) if "all" in splits else splits
