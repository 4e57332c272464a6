"""The fit that lies beside a datastore: where commands look for temperature and lmbda."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from knnext.evaluation.tune import TuneResult
from knnext.output import write_json

#: What a fit says of the search that it belongs to.
SEARCH = ("k", "index", "nprobe", "rescore")


def tuning_path(datastore: str | Path) -> Path:
    """``STORE.tuning.json`` beside the folder ``STORE``, as its index is ``STORE.index``."""
    folder = Path(datastore).resolve()
    return folder.with_name(folder.name + ".tuning.json")


def picture_path(path: Path) -> Path:
    """Of the surface of the fit at `path`; never the same file."""
    name = path.stem if path.suffix != ".png" else path.name
    return path.with_name(f"{name}.png")


@dataclass(frozen=True)
class Replaced:
    """A fit that another took the place of.

    Attributes:
        path: where it lies now.
        better: whether it was the better one, as far as one can tell: the same text (tokens and
            base perplexity), and a lower perplexity.
        words: its figures, for people.
    """

    path: Path
    better: bool
    words: str


def write_tuning(path: Path, found: TuneResult, search: dict[str, Any]) -> Replaced | None:
    """Write a fit with its search (`SEARCH`); what was there is kept under a number.

    Returns what was replaced, or None: nothing was there, or the same fit.
    """
    content = {**search, **found.to_dict()}
    replaced = _keep(path, content)
    write_json(path, content)
    return replaced


def _keep(path: Path, content: dict[str, Any]) -> Replaced | None:
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        old = {}
    if not isinstance(old, dict):
        old = {}
    if {**old, "seconds": 0} == json.loads(json.dumps({**content, "seconds": 0})):
        return None
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
    kept = next(name for name in names if _link(path, name))
    picture = picture_path(kept)
    picture.unlink(missing_ok=True)
    if picture_path(path).exists():
        _link(picture_path(path), picture)
    return Replaced(kept, _better(old, content), _words(old))


def _link(path: Path, name: Path) -> bool:
    """Give the file a second name, if that is free; at no moment is there no fit."""
    if name.exists():
        return False
    try:
        name.hardlink_to(path)
    except FileExistsError:  # of another fit that ended at the same time
        return False
    except OSError:  # a file system without links
        name.write_bytes(path.read_bytes())
    return True


def _better(old: dict[str, Any], new: dict[str, Any]) -> bool:
    def number(name: str) -> float:
        value = old.get(name)
        return float(value) if isinstance(value, int | float) else float("nan")

    same_text = number("num_tokens") == new["num_tokens"] and (
        abs(number("base_perplexity") / new["base_perplexity"] - 1) < 1e-4
    )
    return same_text and number("perplexity") < new["perplexity"]


def _words(old: dict[str, Any]) -> str:
    """``perplexity 12.34 over 10,000 tokens, k 1024``; what is missing is left out."""
    perplexity, tokens, k = (old.get(n) for n in ("perplexity", "num_tokens", "k"))
    words = []
    if isinstance(perplexity, int | float):
        words.append(f"perplexity {perplexity:.2f}")
    if isinstance(tokens, int):
        words.append(f"{tokens:,} tokens")
    if isinstance(k, int):
        words.append(f"k {k}")
    return ", ".join(words) or "not readable"


def edge_notes(found: TuneResult) -> list[str]:
    """A line for each end of the grid at which the fit lies."""
    return [
        f"note: the best point lies at the {edge} of the grid; a wider one may be better"
        for edge in found.edges
    ]
