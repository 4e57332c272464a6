"""One pass of the model and the search over a text, piece by piece.

The model gives a piece (knnext/evaluation/pieces.py), every index searches its queries, what was
found goes where it is kept (knnext/evaluation/spill.py), and the queries are forgotten: so no text
is too long.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from knnext.datastore.overlap import check_overlap
from knnext.evaluation.pieces import PIECE_ROWS, Piece, Scored, model_pieces, settled
from knnext.evaluation.scores import StreamScores
from knnext.evaluation.shares import ranks_among, shares_of
from knnext.evaluation.spill import empty_rows, release
from knnext.index.base import Index
from knnext.index.queries import check_count, check_k
from knnext.ranks import Ranks

if TYPE_CHECKING:
    from knnext.corpus import TokenizedDocuments
    from knnext.datastore import Datastore

_log = logging.getLogger(__name__)


@overload
def search_stream(
    model: nn.Module,
    index: Index,
    tokenized: TokenizedDocuments,
    *,
    k: int = ...,
    key_layer: str | None = ...,
    block_size: int | None = ...,
    stride: int | None = ...,
    batch_size: int | None = ...,
    query_batch: int = ...,
    keep_indices: bool = ...,
    exclude_documents: Tensor | Sequence[int] | None = ...,
    bos: int | Literal["as built"] | None = ...,
    separate_documents: bool | Literal["as built"] = ...,
    full_last_window: bool = ...,
    allow_overlap: bool = ...,
    ranks: Ranks | None = ...,
) -> StreamScores: ...
@overload
def search_stream(
    model: nn.Module,
    index: Mapping[str, Index],
    tokenized: TokenizedDocuments,
    *,
    k: int = ...,
    key_layer: str | None = ...,
    block_size: int | None = ...,
    stride: int | None = ...,
    batch_size: int | None = ...,
    query_batch: int = ...,
    keep_indices: bool = ...,
    exclude_documents: Tensor | Sequence[int] | None = ...,
    bos: int | Literal["as built"] | None = ...,
    separate_documents: bool | Literal["as built"] = ...,
    full_last_window: bool = ...,
    allow_overlap: bool = ...,
    ranks: Ranks | None = ...,
) -> dict[str, StreamScores]: ...
def search_stream(
    model: nn.Module,
    index: Index | Mapping[str, Index],
    tokenized: TokenizedDocuments,
    *,
    k: int = 1024,
    key_layer: str | None = None,
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    query_batch: int = PIECE_ROWS,
    keep_indices: bool = True,
    exclude_documents: Tensor | Sequence[int] | None = None,
    bos: int | Literal["as built"] | None = "as built",
    separate_documents: bool | Literal["as built"] = "as built",
    full_last_window: bool = False,
    allow_overlap: bool = False,
    ranks: Ranks | None = None,
) -> StreamScores | dict[str, StreamScores]:
    """Run the model over a text once, then search every position's neighbors.

    Args:
        model: a causal language model of transformers.
        index: an index, or several by name, which then share the one pass of the model. Their
            datastores must hold keys of one layer, dtype and size.
        tokenized: the text; its T tokens give T - 1 scored targets, or those of them that are
            within a document.
        k: neighbors kept per position.
        key_layer: where queries are taken; by default where the datastore's keys were.
        block_size, stride, batch_size: the model's windows, see `hidden_states`.
        query_batch: queries per search. An exact index reads its datastore once per batch, and no
            more queries are held in memory.
        keep_indices: keep (n, k) int64 row numbers, needed to show neighbors as text.
        exclude_documents: documents of the datastore that must not be found: ids for all, or one
            a position in an (n,) integer tensor.
        bos: the token that every window begins with, or None; by default that of the build.
        separate_documents: read each document alone, and score its own tokens alone: not the mark
            at which the next one begins, which nothing in a document foretells. By default as the
            datastore was built.
        full_last_window: the last window of a text, or of each separate document, reaches back
            until it is full, as lm-evaluation-harness reads.
        allow_overlap: score documents that are in a datastore too. By default an OverlapError (a
            ValueError) names them, as their figures would be too good; those in
            `exclude_documents` are not looked at.
        ranks: processes that score the text together, each the windows of its share; all call
            this alike, and all get the whole result. By default those of a `ShardedIndex`.

    Returns:
        `StreamScores`, or a dict of them under the names given. Neighbors of more than a few
        megabytes lie in a temporary file (knnext/evaluation/spill.py): 8 bytes each on the disk of
        TMPDIR, 16 with their indices.
    """
    indexes = dict(index) if isinstance(index, Mapping) else {"": index}
    k = check_k(k)
    query_batch = check_count("query_batch", query_batch)
    layer, dtype = common_keys(indexes, key_layer)
    if not allow_overlap:
        for searched in _searched(indexes):
            without = _excluded(exclude_documents, searched)
            check_overlap(searched.datastore, tokenized, without)
    if bos == "as built":
        bos = built_with(indexes, "bos")
    if separate_documents == "as built":
        separate_documents = bool(built_with(indexes, "separate_documents"))
    ranks = ranks_among(ranks, indexes.values())
    windows = {
        **settled(model, block_size, stride, batch_size, ranks),
        "bos": bos,
        "separate_documents": bool(separate_documents),
        "full_last_window": full_last_window,
    }
    scored = Scored(tokenized, apart=bool(separate_documents))
    _log.info("searching k = %d neighbors of %d tokens in %s", k, len(scored), _named(indexes))
    shares = shares_of(ranks, tokenized, windows)
    found = {name: _Found(one, len(scored), k, keep_indices) for name, one in indexes.items()}
    targets = torch.empty(len(scored), dtype=torch.int64, device="cpu")
    log_p_lm = torch.empty(len(scored), dtype=torch.float32, device="cpu")
    lm_seconds, start, number = 0.0, time.perf_counter(), 0
    for whole in model_pieces(model, tokenized, layer, dtype, windows, query_batch, shares.mine):
        lm_seconds += time.perf_counter() - start
        piece = scored.of(whole)
        targets[piece.rows], log_p_lm[piece.rows] = piece.targets, piece.log_p_lm
        for one in found.values():
            one.search(piece, exclude_documents)
        start, number = time.perf_counter(), number + 1
    lm_seconds += time.perf_counter() - start
    for _ in range(number, shares.most_pieces(query_batch)):  # others' queries come here too
        for one in found.values():
            one.search(Piece.empty(one.index.datastore), exclude_documents)
    shares.complete([targets, log_p_lm], scored.row)
    for one in found.values():
        shares.complete([one.distances, one.tokens, one.indices], scored.row)
    shared = describe_stream(tokenized, targets, log_p_lm, scored.positions)
    results = {name: one.scores(shared, lm_seconds) for name, one in found.items()}
    return results if isinstance(index, Mapping) else results[""]


def _named(indexes: Mapping[str, Index]) -> str:
    return ", ".join(f"{name} {type(one).__name__}".strip() for name, one in indexes.items())


def _stores(indexes: Mapping[str, Index]) -> list[Datastore]:
    """Each datastore once, though several indexes may search it."""
    return list({one.datastore.fingerprint: one.datastore for one in indexes.values()}.values())


def _searched(indexes: Mapping[str, Index]) -> list[Index]:
    """One of the indexes that search the same rows of a datastore."""
    found: dict[tuple[str, int], Index] = {}
    for one in indexes.values():
        found[one.datastore.fingerprint, id(getattr(one, "filter", None))] = one
    return list(found.values())


def _excluded(documents: Tensor | Sequence[int] | None, index: Index) -> list[int]:
    """Every document that some position leaves out, or the index whatever it is asked."""
    filter = getattr(index, "filter", None)
    always: list[int] = [] if filter is None else filter.left_out(index.datastore)
    if documents is None:
        return always
    return always + torch.as_tensor(documents, dtype=torch.int64, device="cpu").unique().tolist()


def built_with(indexes: Mapping[str, Index], name: str) -> int | None:
    """What all datastores say of their build under a name, None where it is not said."""
    found = {(store.meta.origin or {}).get(name) for store in _stores(indexes)}
    if len(found) > 1:
        raise ValueError(f"the datastores were built with different {name}: {found}; pass {name}")
    value = found.pop()
    return None if value is None else int(value)


def common_keys(indexes: Mapping[str, Index], key_layer: str | None) -> tuple[str, torch.dtype]:
    """The layer and dtype of the queries, which must suit every index."""
    if not indexes:
        raise ValueError("index must name at least one index, got an empty mapping")
    stores = {name: index.datastore for name, index in indexes.items()}
    kinds = {(store.key_layer, store.dtype, store.dim) for store in stores.values()}
    if len(kinds) > 1:
        raise ValueError(
            "indexes searched in one pass must share key_layer, dtype and dim, got "
            + ", ".join(f"{name}: {s.key_layer} {s.dtype} {s.dim}" for name, s in stores.items())
        )
    stored, dtype, _ = kinds.pop()
    if key_layer is not None and stored is not None and key_layer != stored:
        raise ValueError(f"key_layer is {key_layer!r}, but the datastore holds {stored!r} keys")
    layer = key_layer or stored
    if layer is None:
        raise ValueError("the datastore does not name its key_layer: pass key_layer")
    return layer, dtype


def describe_stream(
    tokenized: TokenizedDocuments,
    targets: Tensor,
    log_p_lm: Tensor,
    positions: Tensor | None = None,
) -> dict[str, Any]:
    """The fields of `StreamScores` that do not depend on an index.

    `positions` (n,) are those whose next tokens are the targets; None: 0 to n - 1.
    """
    offsets = torch.as_tensor(tokenized.document_offsets, dtype=torch.int64, device="cpu")
    every = torch.arange(targets.shape[0], device="cpu")
    positions = every if positions is None else positions
    some = not torch.equal(positions, every)
    return {
        "positions": positions + 1 if some else None,
        "log_p_lm": log_p_lm,
        "targets": targets.to(torch.int64),
        # Right-hand bounds skip empty documents, which own no position.
        "document_ids": torch.searchsorted(offsets, positions, right=True) - 1,
        "ends_document": torch.isin(positions + 1, offsets),
        "document_names": list(tokenized.names),
        "words": tokenized.words,
        "num_words": torch.as_tensor(tokenized.num_words, dtype=torch.int64, device="cpu"),
        "num_bytes": torch.as_tensor(tokenized.num_bytes, dtype=torch.int64, device="cpu"),
    }


class _Found:
    """Neighbors of the positions of a text in one index, as they come in."""

    def __init__(self, index: Index, count: int, k: int, keep_indices: bool) -> None:
        self.index, self.k, self.seconds = index, k, 0.0
        self.distances = empty_rows(count, k, torch.float32)
        self.tokens = empty_rows(count, k, torch.int32)
        self.indices = empty_rows(count, k, torch.int64) if keep_indices else None

    def search(self, piece: Piece, exclude_documents: Tensor | Sequence[int] | None) -> None:
        """Add a piece's rows."""
        start = time.perf_counter()
        if isinstance(exclude_documents, Tensor):
            exclude_documents = exclude_documents[piece.rows]
        distances, indices = self.index.search(piece.queries, self.k, exclude_documents)
        self.distances[piece.rows] = distances
        self.tokens[piece.rows] = self.index.tokens(indices)
        if self.indices is not None:
            self.indices[piece.rows] = indices
        release(self.distances, self.tokens, self.indices)
        self.seconds += time.perf_counter() - start

    def scores(self, shared: dict[str, Any], lm_seconds: float) -> StreamScores:
        """All of them, with what does not depend on the index."""
        return StreamScores(
            **shared,
            distances=self.distances,
            tokens=self.tokens,
            indices=self.indices,
            seconds={"lm": lm_seconds, "search": self.seconds},
        )
