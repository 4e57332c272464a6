"""Which rows of a datastore are the very tokens of a text: a token must not be its own neighbor."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from knnext.corpus import TokenizedDocuments
from knnext.datastore import Datastore
from knnext.datastore.overlap import check_overlap
from knnext.index.filter import Filter

EXCLUDE = ("document", "row", "none")


class Own:
    """The documents and rows of a text in a datastore that holds it, or some of it.

    Documents are the same where their hashes are; of several that are alike, the first of the text
    is the first of the datastore, and so on.

    Attributes:
        of_document: (documents,) int64, each document's number in the datastore, or -1.
        copies: documents of the text of which the datastore has further copies, which count as
            other documents.
    """

    def __init__(
        self, store: Datastore, text: TokenizedDocuments, exclude: str, *, allow_overlap: bool
    ) -> None:
        if exclude not in EXCLUDE:
            raise ValueError(f"exclude must be one of {', '.join(EXCLUDE)}; got {exclude!r}")
        self.exclude, self._store, self._text = exclude, store, text
        self.of_document = np.full(text.num_documents, -1, dtype=np.int64)
        self.copies = 0
        self._known: set[int] = set()  # of the datastore: those of the text, and their copies
        if exclude == "none":
            return
        if not store.num_documents or store.document_hashes is None or text.hashes is None:
            raise ValueError(
                f"{store.path}: keeps no hashes of documents, by which a token's own {exclude} "
                "could be left out; if the text is not in it, say exclude='none' (--exclude none)"
            )
        self._match(store.document_hashes, text.hashes)
        if not allow_overlap:
            check_overlap(store, text, self._known)
        if exclude == "row":
            self._shifts = self._find_shifts()

    @property
    def documents(self) -> int:
        """Of the text that are in the datastore."""
        return int((self.of_document >= 0).sum())

    def filter(self, positions: NDArray[np.int64]) -> Filter | None:
        """What the states at `positions`, whose next tokens are the targets, must not find."""
        if self.exclude == "none" or not self.documents:
            return None
        of = self._text.document_of(positions + 1)
        stored = self.of_document[of]
        if self.exclude == "document":
            return Filter(exclude_documents=torch.from_numpy(stored))
        return Filter(own_rows=self._rows(positions, of, stored))

    def _match(self, stored: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> None:
        places: dict[bytes, list[int]] = {}
        begun = (self._store.document_offsets.diff() > 0).tolist()
        for number, row in enumerate(stored):
            if begun[number] and row.any():
                places.setdefault(row.tobytes(), []).append(number)
        used: dict[bytes, int] = {}
        for number, row in enumerate(wanted):
            found = places.get(row.tobytes(), ())
            if found:
                self.copies += len(found) > 1
                self._known.update(found)
                taken = used.get(row.tobytes(), 0)
                self.of_document[number] = found[taken % len(found)]
                used[row.tobytes()] = taken + 1

    def _find_shifts(self) -> NDArray[np.int64]:
        """1 for documents whose separator has no row: nothing stood before the first of a build."""
        offsets = self._store.document_offsets
        shifts = np.zeros(len(self.of_document), dtype=np.int64)
        for number, stored in enumerate(self.of_document.tolist()):
            if stored >= 0:
                first = int(self._store.values[int(offsets[stored])])
                begin = int(self._text.document_offsets[number])
                shifts[number] = first != int(self._text.tokens[begin])
        return shifts

    def _rows(
        self, positions: NDArray[np.int64], of: NDArray[np.int64], stored: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """(n,) the row of each position, -1 for none; ValueError where rows are not the text's."""
        offsets = self._store.document_offsets.numpy()
        within = positions + 1 - self._text.document_offsets[of] - self._shifts[of]
        rows = np.where((stored >= 0) & (within >= 0), offsets[stored] + within, -1)
        inside = rows >= 0
        past = inside & (rows >= offsets[np.maximum(stored, 0) + 1])
        same = False
        if not past.any():
            values = self._store.values[torch.from_numpy(rows[inside])].numpy()
            same = np.array_equal(values, self._text.tokens[positions + 1][inside])
        if not same:
            raise ValueError(
                f"{self._store.path}: its rows do not follow the text token by token (a sample of "
                "it, or tokenized otherwise), so that a token's own row cannot be told; leave out "
                "its own document (exclude='document', --exclude document)"
            )
        return rows
