"""FAISS indexes of keys in memory: trained and filled at once, added to later."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from knnext.index import faiss_build, faiss_library
from knnext.index.sidecar import Sidecar
from knnext.index.tensors import TensorStore

_ADD_ROWS = 65_536


def index_of(
    store: TensorStore,
    factory: str | None,
    *,
    train_size: int | None,
    seed: int,
    nprobe: int,
    gpu: bool | str,
) -> tuple[Any, Sidecar]:
    """A FAISS index of all rows, and what stands for the file that it does not have."""
    rows = cast("Any", store)  # it has all of a datastore that a recipe is made from
    kind = "ip" if store.metric == "cosine" else store.metric
    recipe = faiss_build.make_recipe(rows, factory, train_size, seed, None, metric=kind)
    index = faiss_build.trained(rows, recipe, gpu)
    add_in_pieces(index, store.keys[0 : len(store)])
    return index, Sidecar(recipe, nprobe, faiss_library.version(), 0, "")


def add_in_pieces(index: Any, keys: Tensor) -> None:
    """(n, D) keys, of which few are float32 at once."""
    for part in keys.split(_ADD_ROWS):
        faiss_library.add(index, faiss_library.as_float32(part))
