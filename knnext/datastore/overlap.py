"""Whether a text that is to be scored lies in the datastore already: its perplexity would be a lie.

Documents are compared by the hashes of their texts. Where one side has none (datastores of before,
imports, streams made by hand) those that begin alike are, token for token; and in any case those
of one name, as one of them may have been edited: they are the same where most of one's runs of
tokens stand in the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from knnext.corpus import TokenizedDocuments
from knnext.corpus.documents import few
from knnext.datastore.errors import DatastoreError
from knnext.datastore.reader import DatastoreReader
from knnext.errors import KnnextWarning

_RUN = 8  # tokens; runs of so many are seldom shared by chance
_HEAD = 16
_SHARE = 0.5


class OverlapError(DatastoreError):
    """Documents to be scored are in the datastore. ``names`` has all of them."""

    def __init__(self, message: str, names: list[str]) -> None:
        super().__init__(message)
        self.names = names


def check_overlap(
    store: DatastoreReader, text: TokenizedDocuments, without: Iterable[int] = ()
) -> None:
    """OverlapError if documents of ``text`` are in ``store``, but for those in ``without``.

    A datastore without documents cannot be compared, which is said as a warning.
    """
    if not store.num_documents:
        warnings.warn(
            f"{store.path}: keeps no documents, so that nobody can tell whether the text to be "
            "scored is in it",
            KnnextWarning,
            stacklevel=3,
        )
        return
    found = common_documents(store, text, without)
    if found:
        raise OverlapError(
            f"{len(found):,} of the {text.num_documents:,} documents to be scored are in the "
            f"datastore {store.path} too ({few(found)}): their figures would be far too good. "
            "Score another split or text, or say --allow-overlap (allow_overlap=True)",
            found,
        )


def common_documents(
    store: DatastoreReader, text: TokenizedDocuments, without: Iterable[int] = ()
) -> list[str]:
    """Names, in ``text``, of its documents that have rows in ``store``."""
    inside = (store.document_offsets.diff() > 0).numpy()
    inside[[d for d in without if 0 <= d < len(inside)]] = False
    found = _by_hash(store, text, inside)
    stored = _Stored(store, text, inside)
    for d in range(text.num_documents):
        if d not in found and any(stored.holds(other, d) for other in stored.candidates(d)):
            found.add(d)
    return [text.names[d] for d in sorted(found)]


def _by_hash(
    store: DatastoreReader, text: TokenizedDocuments, inside: NDArray[np.bool_]
) -> set[int]:
    hashes = store.document_hashes
    if hashes is None or text.hashes is None:
        return set()
    stored = {row.tobytes() for row in hashes[inside]} - {bytes(hashes.shape[1])}
    return {d for d, row in enumerate(text.hashes) if row.tobytes() in stored}


class _Stored:
    """The token streams of a datastore's documents, for those that may be one of the text's."""

    def __init__(
        self, store: DatastoreReader, text: TokenizedDocuments, inside: NDArray[np.bool_]
    ) -> None:
        self._store, self._text = store, text
        self._offsets = store.document_offsets.numpy()
        # A sample of rows has no runs of tokens left.
        self._runs = store.is_whole and "subsample_of" not in (store.meta.origin or {})
        hashed = store.document_hashes is not None and text.hashes is not None
        wanted = set(text.names)
        self._named: dict[str, list[int]] = {}
        for document in np.flatnonzero(inside).tolist():
            name = store.document_names[document]
            if name in wanted:
                self._named.setdefault(name, []).append(document)
        self._hashed = hashed
        self._heads = {} if hashed or not self._runs else self._find_heads(inside)

    def candidates(self, document: int) -> list[int]:
        """Documents of the datastore that may be the text's ``document``."""
        named = self._named.get(self._text.names[document], [])
        return [*named, *self._heads.get(self._scored(document)[:_HEAD].tobytes(), [])]

    def holds(self, stored: int, document: int) -> bool:
        """Whether the document ``stored`` is the text's ``document``, or much the same."""
        if not self._runs:
            return not self._hashed  # all that is left to go by is the name, or the hash
        return _much_the_same(self._scored(document), self._tokens(stored))

    def _find_heads(self, inside: NDArray[np.bool_]) -> dict[bytes, list[int]]:
        wanted = {self._scored(d)[:_HEAD].tobytes() for d in range(self._text.num_documents)}
        found: dict[bytes, list[int]] = {}
        for document in np.flatnonzero(inside).tolist():
            head = self._tokens(document, _HEAD + 1)[:_HEAD].tobytes()
            if head in wanted:
                found.setdefault(head, []).append(document)
        return found

    def _tokens(self, stored: int, most: int | None = None) -> NDArray[np.int32]:
        begin, end = (int(offset) for offset in self._offsets[stored : stored + 2])
        values = self._store.values[begin : end if most is None else min(end, begin + most)]
        return self._without_separator(values.to(torch.int32).numpy())

    def _scored(self, document: int) -> NDArray[np.int32]:
        begin, end = self._text.document_offsets[document : document + 2]
        return self._without_separator(self._text.tokens[begin:end].astype(np.int32))

    def _without_separator(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """The datastore's first document has no row for it, as nothing stands before it."""
        separator = self._text.tokens[:1]
        return tokens[1:] if len(tokens) and tokens[0] == separator[0] else tokens


def _much_the_same(scored: NDArray[np.int32], stored: NDArray[np.int32]) -> bool:
    size = min(_RUN, len(scored))
    if not size or len(stored) < size:
        return False
    runs, others = _runs(scored, size), _runs(stored, size)
    return bool(np.isin(runs, others).mean() > _SHARE)


def _runs(tokens: NDArray[np.int32], size: int) -> NDArray[np.void]:
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    return np.ascontiguousarray(windows).view(np.dtype((np.void, 4 * size))).ravel()
