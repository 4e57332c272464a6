"""The sets of centroids that are tried in place of the datastore, and their scores; all kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnext.experiments.lab import EVALUATED, Lab, clusters, lm_training
from knnext.experiments.lab.clusters import Keys
from knnext.experiments.lab.mixture import LogP
from knnext.experiments.lab.soft_rows import (
    WEIGHTS,
    SoftRows,
    one_hot_rows,
    tempered_log_p,
    voted_rows,
)
from knnext.progress import progress

KMEANS, SPHERICAL = "k-means", "spherical k-means"
MEANS, TWO_MEANS, RANDOM, ADAPTIVE = (
    "mean of each word",
    "2-means of each word",
    "2 random keys of each word",
    "adaptive means of each word",
)
BY_WORD = (MEANS, TWO_MEANS, RANDOM, ADAPTIVE)

#: The k-means runs on a share of the keys (the published one on a fifth, for 20 iterations); the
#: assignment is of all keys.
_ROWS_PER_WORD, _ITERATIONS, _SAMPLE = 2, 8, 0.25


@dataclass(frozen=True)
class CentroidSet:
    """Rows in place of the datastore.

    Attributes:
        name, seed: what they are.
        settings: that decide them.
        rows: (R, D) float32.
        words: M by the name of its weights; `"one-hot"` where each row stands for one word.
        normalized: states are brought to length 1 first.
    """

    name: str
    seed: int
    settings: dict[str, Any]
    rows: Tensor
    words: Mapping[str, SoftRows]
    normalized: bool = False

    def states(self, states: Tensor) -> Tensor:
        """States as the rows are compared with them."""
        return clusters.unit(states) if self.normalized else states


def centroid_set(lab: Lab, name: str, seed: int) -> CentroidSet:
    """A set of centroids of the lab's datastore of att states, made once for its settings."""
    option = lab.preset.option
    store, vocab_size = lab.store("att"), lab.padding_token
    rows = round(vocab_size * option("clustering.rows_per_word", _ROWS_PER_WORD))
    sample = round(len(store) * option("clustering.sample", _SAMPLE))
    settings: dict[str, Any] = {
        "datastore": store.fingerprint,
        "name": name,
        "seed": seed,
        "rows": rows,
        "iterations": option("clustering.iterations", _ITERATIONS),
        "sample": min(len(store), max(sample, 2 * rows)),
    }

    def make(folder: Path) -> None:
        with lab.step(f"make centroids: {name}, seed {seed}"):
            keys, words = store.keys, store.values[0 : len(store)].long()
            found = _over_all(keys, settings) if name not in BY_WORD else {}
            if not found:
                rows, owners = _by_word(keys, words, settings)
                found = {"rows": rows, "owners": owners}
            np.savez(
                folder / "rows.npz", allow_pickle=False, **{n: a.numpy() for n, a in found.items()}
            )

    with np.load(lab.cache.get("centroids", settings, make) / "rows.npz") as archive:
        found = {n: torch.from_numpy(archive[n]) for n in archive.files}
    m = _words(lab, found, vocab_size)
    return CentroidSet(name, seed, settings, found["rows"], m, name == SPHERICAL)


def _over_all(keys: Keys, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Centroids of all words together, and each key's centroid and squared distance."""
    spherical, seed = settings["name"] == SPHERICAL, settings["seed"]
    sample = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed), device="cpu")
    sampled = keys[sample[: settings["sample"]].sort().values]
    # On the sphere the distances of exp(-d^2) and 1 / (d^2 + 0.01) are those of unit vectors.
    points = clusters.unit(sampled) if spherical else sampled
    count = min(settings["rows"], len(points))
    centroids = clusters.kmeans(
        points, count, seed=seed, iterations=settings["iterations"], spherical=spherical
    )
    nearest, squares = clusters.assign(keys, centroids, normalized=spherical)
    used, nearest = nearest.unique(return_inverse=True)  # an empty cluster knows no word
    rows = centroids[used]
    if spherical:  # so that scores are as large as those of unscaled states
        rows = rows * sampled.float().square().sum(1).mean()
    return {"rows": rows, "clusters": nearest, "squares": squares}


def _by_word(keys: Keys, words: Tensor, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    name, seed, iterations = settings["name"], settings["seed"], settings["iterations"]
    if name == MEANS:
        return clusters.word_means(keys, words)
    if name == RANDOM:
        return clusters.random_keys(keys, words, 2, seed=seed)
    if name == TWO_MEANS:
        return clusters.word_kmeans(keys, words, 2, seed=seed, iterations=iterations)
    with progress(None, "adaptive k-means", unit="centroids") as bar:
        return clusters.adaptive_word_kmeans(
            keys,
            words,
            settings["rows"],
            seed=seed,
            iterations=iterations,
            tick=lambda: bar.update(1),
        )


def _words(lab: Lab, found: Mapping[str, Tensor], vocab_size: int) -> dict[str, SoftRows]:
    if "owners" in found:
        return {"one-hot": one_hot_rows(found["owners"], vocab_size)}
    store = lab.store("att")
    values = store.values[0 : len(store)].long()
    return {
        weights: voted_rows(found["clusters"], found["squares"], values, vocab_size, weights)
        for weights in WEIGHTS
    }


def components(
    lab: Lab, one: CentroidSet, metric: str, temperatures: Sequence[float]
) -> dict[str, LogP]:
    """Log p of every target by split and temperature, for each M of a set; computed once."""
    settings = {
        "centroids": one.settings,
        "metric": metric,
        "temperatures": list(temperatures),
        "lm": lab.lm().settings,
        "evaluated": lm_training.evaluated(lab),
    }

    def make(folder: Path) -> None:
        with lab.step(f"score states against {one.name}, seed {one.seed} ({metric})"):
            for split in EVALUATED:
                states = lab.states(split, "att")
                found = tempered_log_p(
                    one.states(states.keys),
                    one.rows,
                    states.targets,
                    one.words,
                    metric=metric,
                    temperatures=temperatures,
                    device=lab.device,
                )
                arrays = {name: table.numpy() for name, table in found.items()}
                np.savez(folder / f"{split}.npz", allow_pickle=False, **arrays)

    folder = lab.cache.get("centroid-scores", settings, make)
    tables = {}
    for split in EVALUATED:
        with np.load(folder / f"{split}.npz") as archive:
            tables[split] = {name: torch.from_numpy(archive[name]) for name in archive.files}
    place = {temperature: number for number, temperature in enumerate(temperatures)}

    def component(weights: str) -> LogP:
        return lambda split, temperature: tables[split][weights][place[temperature]]

    return {weights: component(weights) for weights in one.words}
