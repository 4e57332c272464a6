"""The neighbors of the datastore's own rows, each without itself.

A row is its own nearest neighbor, and so must not vote. It is dropped by its number: under an
approximate score, or where a context occurs twice, it need not come first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from knnext.experiments.lab import LM, Lab
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.searches import search, tokens_of
from knnext.progress import progress

_QUERIES = 16_384


@dataclass(frozen=True)
class RowNeighbors:
    """`distances` (n, k) float32 and `tokens` (n, k) int32 of the other rows near (n,) `rows`."""

    rows: Tensor
    distances: Tensor
    tokens: Tensor


def row_neighbors(
    lab: Lab, rows: Tensor, k: int, setting: Setting, *, lm: LM | None = None
) -> RowNeighbors:
    """The k nearest other rows of some rows of the datastore; searched once and kept.

    Args:
        rows: (n,) int64, ascending.
        k: neighbors left when the row itself is gone.
        setting: with `w_ds="datastore"`: state, metric, mask and score.
        lm: whose states; by default the LM of seed 0.
    """
    store = lab.store(setting.h_ds, metric=setting.metric, lm=lm)
    faiss = "faiss" in (setting.mask, setting.score)
    settings = {
        "datastore": store.fingerprint,
        "rows": hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16],
        "k": k,
        "setting": {**setting.to_dict(), "temperature": None},
        "faiss": [lab.preset.nprobe, lab.preset.factory, lab.preset.train_size] if faiss else [],
    }

    def make(folder: Path) -> None:
        index = lab.faiss(store) if faiss else None
        parts: list[tuple[Tensor, Tensor]] = []
        with (
            lab.step(f"search the neighbors of {len(rows):,} rows among the others"),
            progress(len(rows), "search", unit="rows") as bar,
        ):
            for part in rows.split(_QUERIES):
                nprobe, device = lab.preset.nprobe, lab.device
                queries = store.keys[part].float()
                found = search(store, queries, k + 1, setting, index, nprobe, device)
                distances, indices = drop_own(*found, part)
                parts.append((distances, tokens_of(store, indices)))
                bar.update(len(part))
        distances, tokens = (torch.cat(one) for one in zip(*parts, strict=True))
        np.savez(
            folder / "neighbors.npz",
            allow_pickle=False,
            distances=distances.numpy(),
            tokens=tokens.numpy(),
        )

    path = lab.cache.get("row-neighbors", settings, make) / "neighbors.npz"
    with np.load(path, allow_pickle=False) as archive:
        found = {name: torch.from_numpy(archive[name]) for name in archive.files}
    return RowNeighbors(rows, found["distances"], found["tokens"])


def drop_own(distances: Tensor, indices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(n, k) of (n, k + 1) neighbors without the row itself; without the last where it is not
    among them."""
    own = indices == rows[:, None]
    own[:, -1] |= ~own.any(1)
    n, k = distances.shape[0], distances.shape[1] - 1
    return distances[~own].view(n, k), indices[~own].view(n, k)
