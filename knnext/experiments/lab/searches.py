"""The searches of the family: which rows are kept (mask) and how they are scored.

Four pairs: the true k nearest or FAISS's k, scored from the stored keys or from the index's codes.
The fourth, FAISS's scores on the true k nearest, was never run for the paper; the codes of those
rows are decoded for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knnext.experiments.lab.family import Setting
from knnext.index import FaissIndex, StoredCodes
from knnext.index.sharded_crew import open_exact
from knnext.ops import gather_tokens, merge_topk, rescore

if TYPE_CHECKING:
    from knnext.datastore import Datastore

_QUERY_BATCH = 16_384
_GATHER_BYTES = 256 << 20
_COPY_ROWS = 262_144


def search(
    store: Datastore,
    queries: Tensor,
    k: int,
    setting: Setting,
    index: FaissIndex | None,
    nprobe: int,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """(n, k) float32 distances and int64 rows for (n, D) queries, nearest first.

    Args:
        index: of the store, where mask or score are FAISS's; its metric must be the setting's.
        nprobe: lists that FAISS visits.
    """
    if index is not None and index.metric != setting.metric:
        raise ValueError(
            f"the index was built for metric {index.metric!r}, the setting wants "
            f"{setting.metric!r}: their scores mean different things"
        )
    if index is None and "faiss" in (setting.mask, setting.score):
        raise ValueError("mask or score is FAISS's: pass the index")
    exact = open_exact(store, metric=setting.metric, device=device)
    parts = []
    for batch in queries.split(_QUERY_BATCH):
        if setting.mask == "exact":
            distances, rows = exact.search(batch, k)
            if setting.score == "faiss" and index is not None:
                distances, rows = faiss_scores(index, batch, rows)
        else:
            assert index is not None
            real = setting.score == "real"
            distances, rows = index.search(batch, k, nprobe=nprobe, rescore=real)
        parts.append((distances, rows))
    distances, rows = (torch.cat(part) for part in zip(*parts, strict=True))
    return distances, rows


def faiss_scores(index: FaissIndex, queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distances that the index's codes give to chosen rows, and the rows in their order.

    A code's distance is the distance to the vector that it decodes to, so the rows are decoded.
    """
    queries = queries.to(index.datastore.dtype).float()
    step = max(1, _GATHER_BYTES // (rows.shape[1] * index.datastore.dim * 4))
    found = torch.full(rows.shape, float("inf"), dtype=torch.float32, device="cpu")
    ordered = rows.clone()
    for begin in range(0, queries.shape[0], step):
        part = slice(begin, begin + step)
        unique, local = rows[part].unique(return_inverse=True)  # ascending, -1 first
        padding = int(unique.numel() > 0 and unique[0] < 0)
        decoded = index.decode(unique[padding:])
        scores = rescore(queries[part], decoded, local - padding, index.metric)
        found[part], ordered[part] = merge_topk(scores, rows[part], rows.shape[1])
    return found, ordered


def tokens_of(store: Datastore, rows: Tensor) -> Tensor:
    """(n, k) int32 values of rows; -1 stays -1, never the last row."""
    return gather_tokens(store.values[0 : len(store)], rows)


def copy_store(
    store: Datastore, path: Path, *, metric: str, padding: float, padding_token: int
) -> Datastore:
    """A copy of a datastore, declared for a metric, with zero rows as a share of all its rows.

    The zero rows stand for the tail of an over-allocated store (the published one: 26.4 %). Their
    value is `padding_token`, which no text contains.
    """
    from knnext.datastore import Datastore

    zeros = round(len(store) * padding / (1 - padding))
    target = Datastore.create(
        path,
        store.dim,
        store.dtype,
        metric=metric,
        key_layer=store.key_layer,
        vocab_size=padding_token + 1,
        origin={"copy_of": store.fingerprint, "zero_rows": zeros},
        resume=True,
    )
    with target:
        _copy_rows(store, target)
        while len(target) < len(store) + zeros:
            count = min(_COPY_ROWS, len(store) + zeros - len(target))
            keys = torch.zeros(count, store.dim, dtype=store.dtype, device="cpu")
            target.append(
                keys, torch.full((count,), padding_token, dtype=torch.int64, device="cpu")
            )
    copy = Datastore.open(path)
    StoredCodes.renew(copy)
    return copy


def split_store(joined: Datastore, folder: Path, layers: Sequence[str]) -> list[Datastore]:
    """The datastore of each layer out of one whose keys hold theirs side by side, equally wide."""
    from knnext.datastore import Datastore

    width = joined.dim // len(layers)
    if width * len(layers) != joined.dim:
        raise ValueError(f"keys of {joined.dim} dimensions hold no {len(layers)} of one width")
    for number, layer in enumerate(layers):
        target = Datastore.create(
            folder / layer_folder(layer),
            width,
            joined.dtype,
            metric=joined.metric,
            key_layer=layer,
            vocab_size=joined.vocab_size,
            origin={"layer_of": joined.fingerprint},
            resume=True,
        )
        with target:
            _copy_rows(joined, target, slice(number * width, (number + 1) * width))
    return [Datastore.open(folder / layer_folder(layer)) for layer in layers]


def layer_folder(layer: str) -> str:
    """The name of a folder for a layer."""
    return layer.replace(":", "_")


def _copy_rows(store: Datastore, target: Datastore, columns: slice = slice(None)) -> None:
    for begin in range(len(target), len(store), _COPY_ROWS):
        end = min(begin + _COPY_ROWS, len(store))
        target.append(store.keys[begin:end][:, columns], store.values[begin:end])
