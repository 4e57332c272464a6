"""The passes of a model over a text, with the ranks that torchrun has started, where it has.

The first rank runs an experiment and calls the others to these (knnext/index/sharded_crew.py). They
find the model and the text where the first one has them, in the lab's folder, which all see. A text
is cut where batches of windows end, so that states and figures are those of one process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knnext.evaluation import pieces
from knnext.evaluation.shares import shares_of
from knnext.evaluation.spill import empty_rows
from knnext.experiments.lab.texts import TextLab, load_text, save_text
from knnext.index.sharded_crew import call, device_here, is_leading
from knnext.output import scratch_folder
from knnext.ranks import Ranks

if TYPE_CHECKING:
    from knnext.corpus import TokenizedDocuments
    from knnext.datastore import Datastore

_HERE = "knnext.experiments.lab.passes"
Passed = tuple[Tensor, Tensor, Tensor]


def run_model(
    lab: TextLab,
    model: Any,
    text: TokenizedDocuments,
    key_layer: str,
    windows: dict[str, Any],
    place: dict[str, Any] | None = None,
) -> Passed:
    """(n, D) float32 states, (n,) targets and (n,) log p_lm of positions 0 to T - 2, on the CPU.

    Args:
        windows: `block_size`, `stride` and `batch_size`, or None for what is usual.
        place: of the model, see `LM`; of one in memory a copy is written for the other ranks.
    """
    if not is_leading():
        return pieces.run_model(model, text, key_layer, torch.float32, windows)
    grid = pieces.settled(model, **windows)
    with _shared(lab, model, text, place) as given:
        return call(
            f"{_HERE}:states",
            lambda ranks: _states(ranks, lambda: (model, text), key_layer, grid),
            key_layer=key_layer,
            grid=grid,
            **given,
        )


def states(
    ranks: Ranks,
    kept: dict[str, Any],
    *,
    model: dict[str, Any],
    text: str,
    key_layer: str,
    grid: dict[str, int],
) -> None:
    """Another rank's part of `run_model`."""
    _states(ranks, lambda: (_lm(kept, model)[0], load_text(Path(text))), key_layer, grid)


def _states(ranks: Ranks, given: Any, key_layer: str, grid: dict[str, int]) -> Passed:
    """All states on the first rank, of its share on the others."""

    def run() -> tuple[Any, Passed]:
        model, text = given()
        shares = shares_of(ranks, text, {**grid, "separate_documents": False})
        return shares, pieces.run_model(model, text, key_layer, torch.float32, grid, shares.mine)

    shares, mine = ranks.all_or_none("running the model", run)
    width = max(number for (number,) in ranks.gather([mine[0].shape[1]]))
    keys = mine[0] if len(mine[0]) else mine[0].new_empty(0, width)
    rooms: list[Any] = [
        partial(empty_rows, width=width, dtype=keys.dtype),
        *(mine[which].new_empty for which in (1, 2)),
    ]
    found = [shares.collect(one, room) for one, room in zip((keys, *mine[1:]), rooms, strict=True)]
    return found[0], found[1], found[2]


def build_joined(lab: Any, folder: Path, layers: Sequence[str], lm: Any) -> Datastore:
    """`build_joined` of a `Lab` with an `LM`, by all ranks where the others can have the model.

    What one process has begun it also ends, as what several have begun is for several or one.
    """
    from knnext.datastore.meta import BUILD_FILE
    from knnext.datastore.parts import read_plan

    target = folder / "joined"
    begun_alone = (target / BUILD_FILE).exists() and read_plan(target) is None
    if not is_leading() or lm.place is None or begun_alone:
        return _built(lab, folder, layers, lm)
    return call(
        f"{_HERE}:part_of_store",
        lambda ranks: ranks.all_or_none(
            "building the datastore",
            lambda: _built(lab, folder, layers, lm, rank=(0, ranks.size)),
        ),
        model=lm.place,
        text=str(lab.text_file("store").absolute()),
        target=str(target.absolute()),
        facts=lab.corpus.facts("train").to_dict(),
        options=lab.store_options(layers, lm),
    )


def _built(lab: Any, folder: Path, layers: Sequence[str], lm: Any, **options: Any) -> Datastore:
    store: Datastore = lab.build_joined(folder, tuple(layers), lm, **options)
    return store


def part_of_store(
    ranks: Ranks,
    kept: dict[str, Any],
    *,
    model: dict[str, Any],
    text: str,
    target: str,
    facts: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Another rank's part of `build_joined`: it takes parts until none is left."""
    from knnext.corpus import SplitFacts
    from knnext.datastore.build import build_datastore

    def build() -> None:
        build_datastore(
            *_lm(kept, model),
            load_text(Path(text)),
            target,
            corpus=SplitFacts.from_dict(facts),
            rank=(ranks.rank, ranks.size),
            **options,
        )

    ranks.all_or_none("building the datastore", build)


def _lm(kept: dict[str, Any], place: dict[str, Any]) -> tuple[Any, Any]:
    """(model, tokenizer) at a place, on this rank's device; the last one is kept."""
    from knnext.lm.load import load_lm

    name = json.dumps(place, sort_keys=True)
    if kept.get("place") != name:
        kept.clear()  # before another one takes the memory
        kept.update(place=name, lm=load_lm(**device_here(place)))
    found: tuple[Any, Any] = kept["lm"]
    return found


@contextmanager
def _shared(
    lab: TextLab, model: Any, text: TokenizedDocuments, place: dict[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """Where others find a model and a text, for as long as this lasts."""
    from knnext.lm.load import save_lm

    lab.cache.folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(lab.cache.folder.absolute() / "shared") as folder:
        save_text(folder / "text.npz", text)
        if place is None:
            save_lm(folder / "lm", model, lab.tokenizer)
            device = str(next(model.parameters()).device)
            place = {"path": str(folder / "lm"), "model_dtype": "checkpoint", "device": device}
        yield {"model": place, "text": str(folder / "text.npz")}
