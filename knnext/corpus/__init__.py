"""Text in, token streams out: ``load_corpus`` and ``tokenize``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from knnext.corpus.decode import Reading
from knnext.corpus.documents import (
    SHARES,
    SPLITS,
    Corpus,
    CorpusNote,
    Document,
    SplitFacts,
    cap_bytes,
    check_shares,
    drop_copies,
    fill_empty,
    split_by_hash,
)
from knnext.corpus.tokenized import (
    TokenizedDocuments,
    separator_token,
    take_documents,
    tokenize,
    window_bos,
)
from knnext.errors import CorpusError

_log = logging.getLogger(__name__)
__all__ = [
    "Corpus",
    "CorpusError",
    "CorpusNote",
    "Document",
    "SplitFacts",
    "TokenizedDocuments",
    "absolute_spec",
    "load_corpus",
    "separator_token",
    "take_documents",
    "tokenize",
    "window_bos",
]

Splits = dict[str, list[Document]]


def load_corpus(
    spec: str,
    *,
    max_bytes: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    shares: Sequence[float] = SHARES,
    errors: str = "strict",
) -> Corpus:
    """Reads a corpus and its train, valid and test documents.

    ``spec``: ``"stdlib"`` (the running Python's own sources and help topics), a text file, a
    folder, or ``"hf:NAME[@REVISION][:CONFIG]"``. ``max_bytes`` caps the train split, by whole
    documents chosen by hash. ``seed`` moves that choice, and the split where the corpus has none
    of its own. A split that is missing beside a train split is taken out of train by hash.
    ``shares`` are the parts of train, valid and test in a split by hash; of a part of 0 nothing is
    taken. ``errors="replace"`` reads on past bytes that are not UTF-8 and rows without text.

    No text is in two splits: a document of a split by hash that repeats one of train is left out
    (of a corpus with splits of its own, the one in train is). What was left out, skipped or moved
    is said as a warning (CorpusNote) and in ``Corpus.notes``.

    Raises CorpusError (a ValueError) for what cannot be found, read or divided.
    """
    checked, reading = check_shares(shares), Reading(text_column, errors)
    splits = _divide(_read_splits(spec, reading), seed, checked, reading.notes)
    empty = [
        name for name, share in zip(SPLITS, checked, strict=True) if share and not splits[name]
    ]
    if empty:
        count = sum(map(len, splits.values()))
        raise CorpusError(
            f"corpus {spec!r} has {count} documents and none for {', '.join(empty)}; give more "
            "documents, or files named train, valid and test, or shares (--shares 100,0,0 puts "
            "all into train)" + "".join(f"; {note}" for note in reading.notes)
        )
    if max_bytes is not None:
        splits["train"] = cap_bytes(splits["train"], max_bytes, seed)
    for note in reading.notes:
        warnings.warn(note, CorpusNote, stacklevel=2)
    counts = ", ".join(f"{len(splits[name]):,} {name}" for name in SPLITS)
    _log.info("read corpus %s: documents: %s", spec, counts)
    return Corpus(
        absolute_spec(spec),
        splits["train"],
        splits["valid"],
        splits["test"],
        notes=tuple(reading.notes),
        seed=seed,
        shares=checked,
        text_column=text_column,
        max_bytes=max_bytes,
        errors=errors,
    )


def absolute_spec(spec: str) -> str:
    """The same corpus, whatever folder it is named from."""
    if spec == "stdlib":
        return spec
    if spec.startswith("hf:"):
        from knnext.corpus.hub import absolute

        return "hf:" + absolute(spec[len("hf:") :])
    return str(Path(spec).expanduser().resolve())


def _divide(
    found: Splits, seed: int, shares: tuple[float, float, float], notes: list[str]
) -> Splits:
    """The three splits, out of what the corpus names and a hash of the documents' names."""
    splits = {"train": found["all"]} if "all" in found else dict(found)
    own = tuple(name for name in reversed(SPLITS) if name in splits)
    # Splits of the corpus' own are what others measure on: test keeps all it has.
    notes += drop_copies(splits, own)
    missing = tuple(name for name in SPLITS if name not in splits)
    if missing:
        # In this order: train's share is given away, the splits that exist stay as they are.
        splits.update(split_by_hash(splits["train"], seed, ("train", *missing), shares))
        notes += drop_copies(splits, SPLITS, missing, seed)
        wanted = [n for n, share in zip(SPLITS, shares, strict=True) if share and n in missing]
        moved = fill_empty(splits, wanted, seed)
        if moved:
            words = ", ".join(f"{name} gets {document!r}" for name, document in moved.items())
            notes.append(f"the documents are too few to be divided by hash alone: {words}")
    return splits


def _read_splits(spec: str, reading: Reading) -> Splits:
    if not isinstance(spec, str) or not spec:
        raise TypeError(f"spec must be a non-empty string, got {spec!r}")
    if spec == "stdlib":
        from knnext.corpus.stdlib import stdlib_documents

        return {"all": stdlib_documents()}
    if spec.startswith("hf:"):
        from knnext.corpus.hub import hub_splits

        return hub_splits(spec[len("hf:") :], reading)
    return _read_path(spec, reading)


def _read_path(spec: str, reading: Reading) -> Splits:
    from knnext.corpus.files import file_documents, folder_splits

    path = Path(spec).expanduser()
    if path.is_dir():
        return folder_splits(path, reading)
    if path.is_file():
        return {"all": file_documents(path, reading)}
    raise CorpusError(
        f"corpus {spec!r} is no file or folder; wanted is a path, 'stdlib', or "
        "'hf:NAME[:CONFIG]' for a Hugging Face dataset"
    )
