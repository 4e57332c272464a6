"""One pass of the model and the search over a text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from knnext.datastore.overlap import check_overlap
from knnext.evaluation.scores import StreamScores
from knnext.index.base import Index
from knnext.index.queries import check_count, check_k
from knnext.progress import progress

if TYPE_CHECKING:
    from knnext.corpus import TokenizedDocuments
    from knnext.datastore import Datastore


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
    batch_size: int = ...,
    query_batch: int = ...,
    keep_indices: bool = ...,
    exclude_documents: Tensor | Sequence[int] | None = ...,
    bos: int | Literal["as built"] | None = ...,
    allow_overlap: bool = ...,
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
    batch_size: int = ...,
    query_batch: int = ...,
    keep_indices: bool = ...,
    exclude_documents: Tensor | Sequence[int] | None = ...,
    bos: int | Literal["as built"] | None = ...,
    allow_overlap: bool = ...,
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
    batch_size: int = 8,
    query_batch: int = 16_384,
    keep_indices: bool = True,
    exclude_documents: Tensor | Sequence[int] | None = None,
    bos: int | Literal["as built"] | None = "as built",
    allow_overlap: bool = False,
) -> StreamScores | dict[str, StreamScores]:
    """Run the model over a text once, then search every position's neighbors.

    Args:
        model: a causal language model of transformers.
        index: an index, or several by name, which then share the one pass of the model. Their
            datastores must hold keys of one layer, dtype and size.
        tokenized: the text; its T tokens give T - 1 scored targets.
        k: neighbors kept per position.
        key_layer: where queries are taken; by default where the datastore's keys were.
        block_size, stride, batch_size: the model's windows, see `hidden_states`.
        query_batch: queries per search. An exact index reads its datastore once per batch.
        keep_indices: keep (n, k) int64 row numbers, needed to show neighbors as text.
        exclude_documents: documents of the datastore that must not be found: ids for all, or one
            a position in an (n,) integer tensor.
        bos: the token that every window begins with, or None; by default that of the build.
        allow_overlap: score documents that are in a datastore too. By default an OverlapError (a
            ValueError) names them, as their figures would be too good; those in
            `exclude_documents` are not looked at.

    Returns:
        `StreamScores`, or a dict of them under the names given. All queries are held in memory
        for the time of the call: n x dim values of the keys' dtype.
    """
    indexes = dict(index) if isinstance(index, Mapping) else {"": index}
    k = check_k(k)
    query_batch = check_count("query_batch", query_batch)
    layer, dtype = _common_keys(indexes, key_layer)
    for store in _stores(indexes) if not allow_overlap else ():
        check_overlap(store, tokenized, _excluded(exclude_documents))
    if bos == "as built":
        bos = _built_with(indexes, "bos")
    start = time.perf_counter()
    windows = {"block_size": block_size, "stride": stride, "batch_size": batch_size, "bos": bos}
    queries, targets, log_p_lm = run_model(model, tokenized, layer, dtype, windows)
    lm_seconds = time.perf_counter() - start
    shared = describe_stream(tokenized, targets, log_p_lm)
    results = {}
    for name, one in indexes.items():
        start = time.perf_counter()
        found = _search(one, queries, k, query_batch, keep_indices, exclude_documents, name)
        seconds = {"lm": lm_seconds, "search": time.perf_counter() - start}
        results[name] = StreamScores(**shared, **found, seconds=seconds)
    return results if isinstance(index, Mapping) else results[""]


def _stores(indexes: Mapping[str, Index]) -> list[Datastore]:
    """Each datastore once, though several indexes may search it."""
    return list({one.datastore.fingerprint: one.datastore for one in indexes.values()}.values())


def _excluded(documents: Tensor | Sequence[int] | None) -> list[int]:
    """Every document that some position leaves out."""
    if documents is None:
        return []
    return torch.as_tensor(documents, dtype=torch.int64, device="cpu").unique().tolist()


def _built_with(indexes: Mapping[str, Index], name: str) -> int | None:
    found = {(store.meta.origin or {}).get(name) for store in _stores(indexes)}
    if len(found) > 1:
        raise ValueError(f"the datastores were built with different {name}: {found}; pass {name}")
    value = found.pop()
    return None if value is None else int(value)


def _common_keys(indexes: Mapping[str, Index], key_layer: str | None) -> tuple[str, torch.dtype]:
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


def run_model(
    model: nn.Module,
    tokenized: TokenizedDocuments,
    key_layer: str,
    dtype: torch.dtype,
    windows: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, D) queries, (n,) targets and (n,) log p_lm of positions 0 to T - 2, on the CPU."""
    from knnext.lm.hidden_states import hidden_states

    count = max(0, len(tokenized.tokens) - 1)
    if count == 0:
        raise ValueError("tokenized holds fewer than two tokens, there is nothing to score")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with progress(count, "running the model", unit="tokens") as bar:
        for batch in hidden_states(
            model, tokenized.tokens, key_layer=key_layer, dtype=dtype, with_log_p_lm=True, **windows
        ):
            assert batch.log_p_lm is not None  # asked for above
            parts.append((batch.keys.cpu(), batch.targets.cpu(), batch.log_p_lm.cpu()))
            bar.update(len(batch.targets))
    queries, targets, log_p_lm = (torch.cat(part) for part in zip(*parts, strict=True))
    if targets.shape[0] != count:
        raise RuntimeError(f"hidden_states gave {targets.shape[0]} positions, wanted {count}")
    return queries, targets, log_p_lm.float()


def describe_stream(
    tokenized: TokenizedDocuments, targets: Tensor, log_p_lm: Tensor
) -> dict[str, Any]:
    """The fields of `StreamScores` that do not depend on an index."""
    offsets = torch.as_tensor(tokenized.document_offsets, dtype=torch.int64, device="cpu")
    positions = torch.arange(targets.shape[0], device="cpu")
    return {
        "log_p_lm": log_p_lm,
        "targets": targets.to(torch.int64),
        # Right-hand bounds skip empty documents, which own no position.
        "document_ids": torch.searchsorted(offsets, positions, right=True) - 1,
        "ends_document": torch.isin(positions + 1, offsets),
        "document_names": list(tokenized.names),
        "num_words": torch.as_tensor(tokenized.num_words, dtype=torch.int64, device="cpu"),
        "num_bytes": torch.as_tensor(tokenized.num_bytes, dtype=torch.int64, device="cpu"),
    }


def _search(
    index: Index,
    queries: Tensor,
    k: int,
    query_batch: int,
    keep_indices: bool,
    exclude_documents: Tensor | Sequence[int] | None,
    name: str,
) -> dict[str, Any]:
    """Neighbors of all queries, written batch by batch into arrays of their final size."""
    count = queries.shape[0]
    distances = torch.empty(count, k, dtype=torch.float32, device="cpu")
    tokens = torch.empty(count, k, dtype=torch.int32, device="cpu")
    indices = torch.empty(count, k, dtype=torch.int64, device="cpu") if keep_indices else None
    with progress(count, f"searching {name}".rstrip(), unit="tokens") as bar:
        for begin in range(0, count, query_batch):
            part = slice(begin, min(begin + query_batch, count))
            excluded = exclude_documents
            if isinstance(excluded, Tensor):
                excluded = excluded[part]
            distances[part], found = index.search(queries[part], k, excluded)
            tokens[part] = index.tokens(found)
            if indices is not None:
                indices[part] = found
            bar.update(part.stop - begin)
    return {"distances": distances, "tokens": tokens, "indices": indices}
