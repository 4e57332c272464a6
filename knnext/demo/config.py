"""The demo's settings, and the folder that they are written down in."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from knnext.errors import KnnextError
from knnext.output import write_json

#: The systems compared, beside the base LM.
EXACT, FAISS, RESCORED = "exact kNN-LM", "FAISS mask, FAISS score", "FAISS mask, real score"
#: What the names mean: the mask is which rows are taken as neighbors, the score how near they are.
WORDS = {
    "base LM": "the language model alone",
    EXACT: "the nearest of all keys, by their own distances",
    FAISS: "neighbors chosen by FAISS, and its distances to compressed keys",
    RESCORED: "neighbors chosen by FAISS, and their distances to the stored keys",
}


class DemoError(KnnextError, ValueError):
    """A demo that cannot start or go on in its folder; the message says why."""


@dataclass(frozen=True)
class DemoConfig:
    """What decides the result.

    Attributes:
        corpus: see `load_corpus`.
        max_bytes: cap of its train split.
        model: a finished causal LM, as `load_lm` takes it, or `pretrained.SMOLLM2`; None: one is
            trained.
        train_seconds: wall time of training.
        entries: at most so many rows of the datastore, by whole documents of the train split.
        valid_tokens, test_tokens: about so many scored tokens of each split.
        document_tokens: at most so many of one document, from its beginning, so that the figures
            speak for many; more only where the documents are too few to give enough.
        k: neighbors per token.
        seed: of model, training and choices.
    """

    corpus: str = "stdlib"
    max_bytes: int | None = None
    model: str | None = None
    train_seconds: float = 120.0
    entries: int = 1_000_000
    valid_tokens: int = 10_000
    test_tokens: int = 20_000
    document_tokens: int = 300
    k: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("entries", "valid_tokens", "test_tokens", "document_tokens", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed}")
        if not 0 < self.train_seconds < math.inf:
            raise ValueError(f"train_seconds must be positive, got {self.train_seconds}")


#: About a minute on two cores: every step, at sizes that still show the gain.
SHORT: dict[str, Any] = {
    "train_seconds": 25.0,
    "entries": 80_000,
    "valid_tokens": 3_000,
    "test_tokens": 5_000,
    "document_tokens": 100,
}

#: With a finished LM, in some 20 minutes on two cores: SmolLM2 is a hundred times as large.
FINISHED: dict[str, Any] = {
    "entries": 200_000,
    "valid_tokens": 5_000,
    "test_tokens": 10_000,
    "document_tokens": 200,
}
FINISHED_SHORT: dict[str, Any] = {
    "entries": 20_000,
    "valid_tokens": 1_500,
    "test_tokens": 3_000,
    "document_tokens": 100,
}


def sizes(*, finished: bool, short: bool) -> dict[str, Any]:
    """The settings that differ from a demo's defaults, for a finished LM or a short demo."""
    if finished:
        return FINISHED_SHORT if short else FINISHED
    return SHORT if short else {}


_CONTENTS = (
    *("training.json", "results.json", "tuning.png", "report.html"),
    *(
        "model",
        "model.part",
        "datastore",
        "datastore.index",
        "datastore.codes",
        "datastore.tuning.json",
    ),
)


def claim(out: Path, config: DemoConfig, fresh: bool) -> None:
    """Write the settings into the folder, or check that those there are the same."""
    path = out / "demo.json"
    if not path.exists() and out.is_dir() and any(out.iterdir()):
        raise DemoError(f"{out} is not empty and holds no demo; give another --out")
    if path.exists() and not fresh:
        _check(path, out, config)
        return
    for name in _CONTENTS:
        _remove(out / name)
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(config))


def _check(path: Path, out: Path, config: DemoConfig) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {"model": None, **found}  # folders of before there was a choice
        names = [f.name for f in fields(DemoConfig)]
        differing = [n for n in names if kept[n] != getattr(config, n)]
    except (ValueError, KeyError, TypeError) as error:
        raise DemoError(f"{path} is damaged ({error}); start over with --fresh") from None
    if differing:
        words = ", ".join(f"{n} {kept[n]!r}, not {getattr(config, n)!r}" for n in differing)
        raise DemoError(
            f"{out} holds a demo with other settings ({words}); start over with --fresh, "
            "or give another --out"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
