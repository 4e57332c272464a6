"""Documents and corpora: plain records, and the two rules that divide them.

Both rules go by a hash of the document's name and not by its position, so that adding or losing a
document moves no other one from split to split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Shares of train and valid (the rest is test) where a corpus brings no split of its own.
TRAIN_SHARE, VALID_SHARE = 0.8, 0.1

SPLITS = ("train", "valid", "test")


class CorpusError(ValueError):
    """A corpus that cannot be found, read or divided; the message says what was wanted."""


@dataclass(frozen=True)
class Document:
    """One text with the name under which reports and neighbours show it."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length in UTF-8 bytes."""
        return len(self.text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Corpus:
    """Three lists of documents; no document is in two of them."""

    name: str
    train: list[Document] = field(default_factory=list)
    valid: list[Document] = field(default_factory=list)
    test: list[Document] = field(default_factory=list)

    def split(self, name: str) -> list[Document]:
        """The documents of ``"train"``, ``"valid"`` or ``"test"``."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {name!r}")
        documents: list[Document] = getattr(self, name)
        return documents

    def describe(self) -> str:
        """One line for logs and for the datastore's metadata."""
        parts = (
            f"{name} {len(docs):,} documents, {sum(d.num_bytes for d in docs) / 1e6:.1f} MB"
            for name, docs in ((s, self.split(s)) for s in SPLITS)
        )
        return f"{self.name}: " + "; ".join(parts)


def name_hash(name: str, seed: int) -> float:
    """A number in [0, 1), the same on every machine and run, from a name and a seed."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def split_by_hash(
    documents: Iterable[Document],
    seed: int,
    into: tuple[str, ...] = SPLITS,
) -> dict[str, list[Document]]:
    """Divides documents by ``name_hash``: below 0.8 train, below 0.9 valid, the rest test.

    With fewer names in ``into``, a split that is not wanted gives its share to train.
    """
    result: dict[str, list[Document]] = {name: [] for name in into}
    for document in documents:
        position = name_hash(document.name, seed)
        valid = TRAIN_SHARE <= position < TRAIN_SHARE + VALID_SHARE
        wanted = "train" if position < TRAIN_SHARE else "valid" if valid else "test"
        result[wanted if wanted in result else "train"].append(document)
    return result


def cap_bytes(documents: list[Document], max_bytes: int, seed: int) -> list[Document]:
    """Whole documents of at most ``max_bytes`` UTF-8 bytes together, in their old order.

    They are taken in the order of their hash, so that the part stands for the whole and is not
    its alphabetical head; a document that no longer fits is passed over.
    """
    if max_bytes <= 0:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")
    # Salted: taken by the very hash that made the split, the order would still be fair, but the
    # two choices would then be one, and a change to either would move both.
    order = sorted(range(len(documents)), key=lambda i: name_hash(documents[i].name, seed + 1))
    kept, used = [], 0
    for i in order:
        size = documents[i].num_bytes
        if used + size <= max_bytes:
            kept.append(i)
            used += size
    if documents and not kept:
        smallest = min(d.num_bytes for d in documents)
        raise CorpusError(
            f"max_bytes={max_bytes:,} leaves no training document: the smallest has {smallest:,} "
            "bytes, and documents are kept whole"
        )
    return [documents[i] for i in sorted(kept)]


def unique_names(documents: list[Document]) -> list[Document]:
    """Appends ``~2``, ``~3`` to names that return: names address documents in a datastore."""
    totals = Counter(d.name for d in documents)
    seen: Counter[str] = Counter()
    result = []
    for document in documents:
        seen[document.name] += 1
        again = totals[document.name] > 1 and seen[document.name] > 1
        name = f"{document.name}~{seen[document.name]}" if again else document.name
        result.append(Document(name, document.text))
    return result
