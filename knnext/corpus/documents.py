"""Documents and corpora: plain records, and the rules that divide them.

The rules go by a hash of the document's name and not by its position, so that adding or losing a
document moves no other one from split to split.
"""

from __future__ import annotations

import hashlib
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from knnext.errors import CorpusError, KnnextWarning

SPLITS = ("train", "valid", "test")
#: Parts of train, valid and test in a hundred, where a corpus brings no split of its own.
SHARES = (80.0, 10.0, 10.0)

HASH_BYTES = 16
_SPACE = string.whitespace.encode()


class CorpusNote(KnnextWarning):
    """What was left out of a corpus or moved in it, for people to know."""


@dataclass(frozen=True)
class Document:
    """One text with the name under which reports and neighbours show it."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length in UTF-8 bytes."""
        return len(self.text.encode("utf-8", "surrogatepass"))

    @cached_property
    def content_hash(self) -> bytes:
        """16 bytes that stand for the text but for its space and line ends: BLAKE2b of the rest.

        A copy keeps it under another name, and through other line ends or indentation.
        """
        content = self.text.encode("utf-8", "surrogatepass").translate(None, _SPACE)
        return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()


@dataclass(frozen=True)
class SplitFacts:
    """Which text a split is, in a form to keep: enough to read it again and to know it again.

    Attributes:
        corpus: what `load_corpus` reads, with a path made absolute.
        split: `"train"`, `"valid"` or `"test"`.
        seed, shares, text_column, max_bytes, errors: as `load_corpus` got them.
        documents: 16 hexadecimal digits of the names and texts of the split's documents; None
            where several splits were merged.
    """

    corpus: str
    split: str
    seed: int
    shares: tuple[float, float, float]
    text_column: str
    max_bytes: int | None
    errors: str
    documents: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"shares": list(self.shares)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> SplitFacts:
        """What `to_dict` gave; later versions may have added to it."""
        values = {f.name: found[f.name] for f in fields(cls)}
        return cls(**values | {"shares": tuple(found["shares"])})


@dataclass(frozen=True)
class Corpus:
    """Three lists of documents; no document is in two of them, and no text is.

    `notes` says what was left out or moved when it was read. The rest is what `load_corpus` got.
    """

    name: str
    train: list[Document] = field(default_factory=list)
    valid: list[Document] = field(default_factory=list)
    test: list[Document] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    seed: int = 0
    shares: tuple[float, float, float] = SHARES
    text_column: str = "text"
    max_bytes: int | None = None
    errors: str = "strict"

    def split(self, name: str) -> list[Document]:
        """The documents of ``"train"``, ``"valid"`` or ``"test"``."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {name!r}")
        documents: list[Document] = getattr(self, name)
        return documents

    def facts(self, split: str) -> SplitFacts:
        """What a datastore of that split keeps of it; `build_datastore` takes it as ``corpus``."""
        digest = hashlib.blake2b(digest_size=8)
        for document in self.split(split):
            name = document.name.encode("utf-8", "surrogatepass")
            digest.update(len(name).to_bytes(8, "little") + name + document.content_hash)
        options = {n: getattr(self, n) for n in ("seed", "shares", "text_column", "max_bytes")}
        return SplitFacts(
            self.name, split, **options, errors=self.errors, documents=digest.hexdigest()
        )

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


def few(names: Sequence[str], most: int = 5) -> str:
    """``a, b, c and 7 more``"""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def check_shares(shares: Sequence[float]) -> tuple[float, float, float]:
    """The shares of train, valid and test as parts of a hundred; ValueError for what is none."""
    values = [float(share) for share in shares]
    total = sum(values)
    if len(values) != 3 or not 0 < total < float("inf") or not all(v >= 0 for v in values):
        raise ValueError(
            "shares must be three numbers of at least 0, not all 0, for train, valid and test, "
            f"as 80,10,10; got {','.join(map(str, shares))}"
        )
    train, valid, test = (100 * value / total for value in values)
    if not train:
        raise ValueError(f"shares must leave something to train, got {','.join(map(str, shares))}")
    return train, valid, test


def split_by_hash(
    documents: Iterable[Document],
    seed: int,
    into: tuple[str, ...] = SPLITS,
    shares: Sequence[float] = SHARES,
) -> dict[str, list[Document]]:
    """Divides documents by ``name_hash``: with shares 80, 10, 10 below 0.8 train, below 0.9 valid,
    the rest test.

    With fewer names in ``into``, a split that is not wanted gives its share to train.
    """
    train, valid, _ = check_shares(shares)
    result: dict[str, list[Document]] = {name: [] for name in into}
    for document in documents:
        position = 100 * name_hash(document.name, seed)
        later = "valid" if position < train + valid else "test"
        wanted = "train" if position < train else later
        result[wanted if wanted in result else "train"].append(document)
    return result


def fill_empty(
    splits: dict[str, list[Document]], wanted: Iterable[str], seed: int
) -> dict[str, str]:
    """Moves one document of train into each wanted split that has none; the names of the moved.

    Few documents may all hash into train. The highest hashes are taken, which are the next to the
    other splits, of texts that stand in train once. One document at least stays in train.
    """
    moved: dict[str, str] = {}
    counts = Counter(d.content_hash for d in splits["train"])
    alone = [d for d in splits["train"] if counts[d.content_hash] == 1]
    alone.sort(key=lambda d: name_hash(d.name, seed))
    for name in reversed([s for s in SPLITS if s in set(wanted) and not splits[s]]):
        if len(splits["train"]) > 1 and alone:
            document = alone.pop()
            splits["train"].remove(document)
            splits[name].append(document)
            moved[name] = document.name
    return moved


def drop_copies(
    splits: dict[str, list[Document]],
    order: Sequence[str],
    refill: Iterable[str] = (),
    seed: int = 0,
) -> list[str]:
    """Keeps each text in one split only, the first in ``order`` that has it; lines that say so.

    Copies within one split stay. So does a split that holds nothing else, where train has no
    document to give to it by `fill_empty` (which it has for those in ``refill`` alone).
    """
    seen: set[bytes] = set()
    notes = []
    for name in order:
        found = splits.get(name, [])
        copies = [d.name for d in found if d.content_hash in seen]
        if not copies:
            seen.update(d.content_hash for d in found)
            continue
        what = f"{len(copies):,} documents of {name} repeat the text of another split"
        splits[name] = [d for d in found if d.content_hash not in seen]
        if not splits[name] and not (name in refill and fill_empty(splits, [name], seed)):
            splits[name] = found
            notes.append(f"{what} and are all that it has; they stay in both")
        else:
            notes.append(f"{what} and were left out of {name}: {few(copies, 3)}")
        seen.update(d.content_hash for d in splits[name])
    return notes


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
