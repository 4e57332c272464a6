"""Small datastores with clusters, for the tests of FaissIndex."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from knnext.datastore import Datastore

DIM, ROWS = 32, 3000


def clustered(rows: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    centers = torch.randn(40, DIM, generator=generator) * 2
    generator.manual_seed(seed)
    which = torch.randint(0, 40, (rows,), generator=generator)
    return (centers[which] + torch.randn(rows, DIM, generator=generator) * 0.7).to(dtype)


def make_datastore(
    path: Path, keys: Tensor, metric: str = "l2", num_documents: int = 6
) -> Datastore:
    per_document = -(-keys.shape[0] // num_documents)
    sizes = [
        (f"d{i}", min(per_document, keys.shape[0] - i * per_document)) for i in range(num_documents)
    ]
    with Datastore.create(
        path, keys.shape[1], keys.dtype, metric=metric, key_layer="att", entries_per_shard=800
    ) as store:
        store.append(keys, torch.arange(keys.shape[0]) % 50, sizes)
    return Datastore.open(path)
