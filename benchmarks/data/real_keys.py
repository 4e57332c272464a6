"""Real keys: hidden states of the demo's language model, which cluster as gaussian keys do not.

    python -m benchmarks.data.real_keys                  # train, then store a million states
    pytest benchmarks --datastore=knnext-demo/datastore  # or those of `make demo`, or any other

The text is Python's own standard library, so it works offline. The states are 128 wide: a model
with D = 1024 cannot be trained within minutes, and none can be had offline, so no real keys of that
width are measured here; a datastore of such a model can be given with --datastore.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from knnext import Datastore

FOLDER = Path(__file__).resolve().parents[1] / "out" / "lm-keys"
HINT = (
    "make them with `python -m benchmarks.data.real_keys` (it needs the extra lm), or give the "
    "folder of a datastore with --datastore"
)
#: The last rows of the datastore are kept out of the keys and asked about.
HELD_OUT = 16_384


class _Place:
    folder = FOLDER / "datastore"


def use(folder: Path) -> None:
    """Take keys from this datastore from now on."""
    _Place.folder = folder


def _store() -> Datastore:
    import pytest

    from knnext import Datastore

    if not (_Place.folder / "meta.json").is_file():
        pytest.skip(f"no real keys: {HINT}")
    return Datastore.open(_Place.folder)


def _num_keys(store: Datastore) -> int:
    return store.num_entries - min(HELD_OUT, store.num_entries // 2)


@lru_cache(maxsize=1)
def load_keys(entries: int) -> Tensor:
    """(N, D) on the CPU: at most `entries` rows, those in front of the held-out ones."""
    store = _store()
    stop = _num_keys(store)
    return store.keys[max(0, stop - entries) : stop]


def load_queries(count: int) -> Tensor:
    """(count, D) on the CPU, spread over the held-out rows; ValueError where they are fewer."""
    import torch

    store = _store()
    first = _num_keys(store)
    held_out = store.num_entries - first
    if held_out < count:
        raise ValueError(
            f"{_Place.folder} holds {store.num_entries} rows, too few to ask {count} queries of"
        )
    return store.keys[first + torch.arange(count) * held_out // count]


def make(folder: Path, rows: int, steps: int) -> Path:
    """Trains the demo's model for `steps` and stores `rows` of its states; goes on where it can."""
    from knnext.corpus import load_corpus, take_documents, tokenize
    from knnext.datastore.build import build_datastore
    from knnext.lm.load import load_lm, save_lm
    from knnext.lm.train import train_lm, train_tokenizer

    documents = load_corpus("stdlib").train
    if not (folder / "model" / "config.json").exists():
        tokenizer = train_tokenizer(documents)
        tokens = tokenize(documents, tokenizer).tokens
        trained = train_lm(tokens, tokenizer, max_steps=steps)
        save_lm(folder / "model", trained.model, tokenizer)
    model, tokenizer = load_lm(folder / "model")
    stream = take_documents(tokenize(documents, tokenizer), rows + 1)
    build_datastore(
        _placed(model), tokenizer, stream, folder / "datastore", stride=96, batch_size=32
    )
    return folder / "datastore"


def _placed(model):
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data.real_keys", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="hidden states to store")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of 512 tokens")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    print(make(given.out, given.rows, given.steps))


if __name__ == "__main__":
    main()
