"""Text in, token streams out: ``load_corpus`` and ``tokenize``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knnext.documents import (
    SPLITS,
    Corpus,
    CorpusError,
    Document,
    cap_bytes,
    split_by_hash,
)

__all__ = [
    "Corpus",
    "CorpusError",
    "Document",
    "TokenizedDocuments",
    "load_corpus",
    "separator_token",
    "tokenize",
]

#: The tokenizer gets at least so much text at once, which keeps its threads busy.
_BATCH_CHARS = 1 << 20


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
        from knnext.corpus_stdlib import stdlib_documents

        return split_by_hash(stdlib_documents(), seed)
    if spec.startswith("hf:"):
        from knnext.corpus_hub import hub_splits

        return hub_splits(spec[len("hf:") :], text_column)
    return _read_path(spec, seed, text_column)


def _read_path(spec: str, seed: int, text_column: str) -> dict[str, list[Document]]:
    from knnext.corpus_files import file_documents, folder_splits

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


@dataclass
class TokenizedDocuments:
    """One stream of tokens, and where each document lies in it.

    ``tokens`` (T,) int32; document i is ``tokens[offsets[i]:offsets[i + 1]]`` and begins with the
    separator (bos or eos), so that each of its own tokens is a target. ``document_offsets``
    (n + 1,) int64. ``num_words`` (n,) int64 counts whitespace-separated words and ``num_bytes``
    (n,) int64 UTF-8 bytes, both of exactly the text whose tokens are here; the separator counts
    as neither.
    """

    tokens: np.ndarray
    document_offsets: np.ndarray
    names: list[str]
    num_words: np.ndarray
    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.names)

    def document_of(self, positions: np.ndarray) -> np.ndarray:
        """The document (int64) in which each stream position lies."""
        return np.searchsorted(self.document_offsets, positions, side="right") - 1


def separator_token(tokenizer: Any) -> int:
    """The id that stands before each document: bos, or eos where there is no bos."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise ValueError(
        "tokenizer has neither bos_token nor eos_token; one is needed to stand before each document"
    )


def tokenize(
    documents: Sequence[Document], tokenizer: Any, *, max_tokens: int | None = None
) -> TokenizedDocuments:
    """One flat stream of all documents, in order, each led by the separator.

    ``tokenizer``: a fast tokenizer of transformers. Special tokens spelled out in the text are
    read as plain text, so that no separator but ours is in the stream. ``max_tokens`` keeps only
    the head of each document (words and bytes are then those of the head): the way to evaluate on
    many documents at a small cost.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer must be a fast one (with offsets), got {type(tokenizer)}")
    separator = separator_token(tokenizer)
    parts, lengths, words, num_bytes = [], [], [], []
    for texts in _batches(documents):
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_offsets_mapping=max_tokens is not None,
            verbose=False,
        )
        for i, text in enumerate(texts):
            ids = encoded["input_ids"][i]
            if max_tokens is not None and len(ids) > max_tokens:
                text = text[: encoded["offset_mapping"][i][max_tokens - 1][1]]
                ids = ids[:max_tokens]
            parts.append(np.asarray([separator, *ids], dtype=np.int32))
            lengths.append(len(ids) + 1)
            words.append(len(text.split()))
            num_bytes.append(len(text.encode("utf-8", "surrogatepass")))
    return TokenizedDocuments(
        tokens=np.concatenate(parts) if parts else np.empty(0, np.int32),
        document_offsets=np.cumsum([0, *lengths], dtype=np.int64),
        names=[d.name for d in documents],
        num_words=np.asarray(words, dtype=np.int64),
        num_bytes=np.asarray(num_bytes, dtype=np.int64),
    )


def _batches(documents: Sequence[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
