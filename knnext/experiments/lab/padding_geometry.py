"""For which keys zero rows matter: how deep they lie in the cloud, and what moving it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnext.evaluation.scores import StreamScores
from knnext.experiments.lab import EVALUATED, Lab
from knnext.experiments.lab.contrast import Fitted, advantage, fit_component
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.mixture import DEFAULT_TEMPERATURES
from knnext.experiments.lab.zero_rows import (
    cloud_of,
    depths,
    insert_zero_rows,
    places_share,
    places_taken,
)

MEAN_SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
#: k / N of the published datastore without its zero rows, at 5 % and at 100 % (spec of its code).
PAPER_KEPT = {"5 %": 1024 / 5_637_248, "100 %": 1024 / 112_733_184}

_QUERIES, _ROWS = 256, 400_000
_KEPT = np.geomspace(1e-6, 0.3, 56)


def depth_curves(lab: Lab, fractions: Sequence[float]) -> dict[str, Any]:
    """Mean share of the k places that zero rows take, by k / N, for att as it is and moved, and
    for ffn as it is; from the depth of the zero row in sampled queries' order of all keys."""
    curves = []
    for layer in ("att", "ffn"):
        keys, queries = _sampled_keys(lab, layer), _sampled_queries(lab, layer)
        cloud = cloud_of(keys)
        moved = _mean_shares(lab) if layer == "att" else ()
        places = [torch.zeros_like(cloud.mean), *(cloud.origin(m) for m in moved)]
        found = depths(queries, keys, torch.stack(places))
        for column, mean_share in enumerate((cloud.mean_share, *moved)):
            curves.append(_curve(layer, column > 0, mean_share, found[:, column]))
    ours = {f"{f:.3g}": lab.preset.k / (f * len(lab.store())) for f in fractions}
    return {"kept": _KEPT.tolist(), "curves": curves, "ours": ours, "paper": PAPER_KEPT}


def moved_origins(lab: Lab, fractions: Sequence[float], share: float) -> list[dict[str, Any]]:
    """What zero rows would cost exact search if the same keys lay elsewhere.

    Moving keys and queries together changes no distance between them, so nothing is searched: the
    zero rows are put into the neighbors that were found without them.
    """
    cloud = cloud_of(_sampled_keys(lab, "att"))
    places = [(cloud.mean_share, False, torch.zeros_like(cloud.mean))]
    places += [(m, True, cloud.origin(m)) for m in _mean_shares(lab)]
    out = []
    for fraction in fractions:
        out += _moved(lab, fraction, share, places)
    return out


def _moved(
    lab: Lab, fraction: float, share: float, places: Sequence[tuple[float, bool, Tensor]]
) -> list[dict[str, Any]]:
    valid, test = lab.splits()
    rows = len(lab.store(fraction=fraction))
    zeros, token = round(rows * share / (1 - share)), lab.padding_token
    found = {name: lab.neighbors(Setting(fraction=fraction), name) for name in EVALUATED}
    grid = lab.preset.option("padding.moved_temperatures", DEFAULT_TEMPERATURES[::2])

    def fit(scores: Mapping[str, StreamScores]) -> Fitted:
        return fit_component(
            valid,
            test,
            lambda name, t: scores[name].log_p_knn(t),
            grid,
            resamples=lab.preset.resamples,
        )

    clean = fit(found)
    out = []
    for mean_share, moved, origin in places:
        with_rows = {
            name: insert_zero_rows(found[name], _from(lab, name, origin), zeros, token)
            for name in EVALUATED
        }
        fitted = fit(with_rows)
        taken = places_taken(with_rows["test"], token).double().mean() / lab.preset.k
        gain = advantage(test, fitted.log_p, clean.log_p, lab.preset.resamples)
        out.append(
            {
                "fraction": fraction,
                "mean_share": mean_share,
                "moved": moved,
                "places": float(taken),
                "temperature": fitted.mixture.temperature,
                "gain": gain.to_dict(),
            }
        )
    return out


def _mean_shares(lab: Lab) -> tuple[float, ...]:
    return tuple(lab.preset.option("padding.mean_shares", MEAN_SHARES))


def _from(lab: Lab, split: str, origin: Tensor) -> Tensor:
    """(n,) squared distance of each query, rounded as in a search, from a point."""
    keys = lab.states(split).keys.to(lab.store().dtype).float()
    return (keys - origin).square().sum(1)


def _sampled_queries(lab: Lab, layer: str) -> Tensor:
    queries = lab.states("test", layer).keys.to(lab.store(layer).dtype).float()
    return queries[_sample(queries.shape[0], _QUERIES)]


def _sampled_keys(lab: Lab, layer: str) -> Tensor:
    store = lab.store(layer)
    if len(store) <= _ROWS:
        return store.keys[0 : len(store)].float()
    return store.keys[_sample(len(store), _ROWS)].float()


def _sample(count: int, most: int) -> Tensor:
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")[:most]
    return chosen.sort().values


def _curve(layer: str, moved: bool, mean_share: float, depth: Tensor) -> dict[str, Any]:
    quantiles = depth.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device="cpu"))
    return {
        "h_ds": layer,
        "moved": moved,
        "mean_share": mean_share,
        "depth": dict(zip(("low", "median", "high"), quantiles.tolist(), strict=True)),
        "places": [places_share(depth, kept) for kept in _KEPT.tolist()],
        "at paper": {name: places_share(depth, kept) for name, kept in PAPER_KEPT.items()},
    }
