"""The arithmetic of passages.js in node, against the mathematics in Python."""

from __future__ import annotations

import base64
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NODE = shutil.which("node")
SCRIPT = Path(__file__).resolve().parents[2] / "knnext" / "report" / "passages.js"
SETTINGS = [(0.5, 0.4, 6), (3.0, 0.0, 6), (3.0, 1.0, 6), (0.01, 0.7, 2), (1e-3, 0.5, 1)]


def packed(values: Any, kind: str) -> str:
    return base64.b64encode(np.asarray(values, dtype=kind).tobytes()).decode()


def passage() -> dict[str, Any]:
    """Three positions of four candidates each: the second has two neighbors, the third none."""
    rng = np.random.default_rng(0)
    distances = np.sort(rng.random((3, 6)) * 5 - 3, axis=1).astype("<f4")  # as of ip, below 0 too
    places = rng.integers(0, 4, (3, 6))
    places[1, 2:], places[2] = 0xFFFF, 0xFFFF
    distances[1, 2:], distances[2] = np.inf, np.inf
    log_p = np.log(rng.dirichlet(np.ones(4), 3) * 0.9).astype("<f4")
    return {
        "name": "x", "cut": [False, False], "texts": ["a", "b", "c"], "copied": [0, 0, 0],
        "vocab": ["a", "b", "c", "d"], "k": 6, "rows": [[5, 6, 7, 8, 9, 4], [5, 6], []],
        "distances": packed(distances, "<f4"), "places": packed(places, "<u2"),
        "starts": packed([0, 4, 8, 12], "<i4"), "ids": packed([0, 1, 2, 3] * 3, "<i4"),
        "log_p": packed(log_p, "<f4"), "target_places": packed([1, int(places[1, 0]), 2], "<u2"),
        "_arrays": (distances, places, log_p),
    }  # fmt: skip


def expected(raw: dict[str, Any], i: int, temperature: float, lmbda: float, k: int) -> Any:
    """(p_lm, p_knn, p) of the four candidates."""
    distances, places, log_p = raw["_arrays"]
    lm, knn = np.exp(log_p[i].astype(float)), np.zeros(4)
    kept = places[i, :k] != 0xFFFF
    if not kept.any():
        return lm, knn, lm
    near = distances[i, :k][kept].astype(float)
    weights = np.exp((near[0] - near) / temperature)
    np.add.at(knn, places[i, :k][kept], weights / weights.sum())
    return lm, knn, (1 - lmbda) * lm + lmbda * knn


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
def test_mixing_agrees_with_python() -> None:
    raw = passage()
    given = {name: value for name, value in raw.items() if name != "_arrays"}
    program = (
        SCRIPT.read_text(encoding="utf-8")
        + f"""
    const of = new knnextPassages.Whole({json.dumps(given)}, null), found = [];
    for (const [temperature, lmbda, k] of {json.dumps(SETTINGS)}) {{
      const s = {{ temperature, lmbda, k }};
      found.push([0, 1, 2].map((i) => ({{
        knn: String(of.knn(i, 0, s)), mix: String(of.mix(i, 0, s)), top: of.top(i, 0, s),
        target: of.target(i), near: of.neighbors(i, 0, s),
      }})));
    }}
    console.log(JSON.stringify(found));"""
    )
    done = subprocess.run(
        [str(NODE), "-e", program], capture_output=True, text=True, timeout=120, check=True
    )
    for setting, positions in zip(SETTINGS, json.loads(done.stdout), strict=True):
        for i, found in enumerate(positions):
            lm, knn, p = expected(raw, i, *setting)
            target = found["target"]
            for name, wanted in (("knn", knn[target]), ("mix", p[target])):
                value = float(found[name].replace("Infinity", "inf"))
                assert math.exp(value) == pytest.approx(wanted, rel=1e-9), (setting, i, name)
            for row in found["top"]:
                assert [row["lm"], row["knn"], row["mix"]] == pytest.approx(
                    [lm[row["id"]], knn[row["id"]], p[row["id"]]], rel=1e-9
                )
            order = [row["mix"] for row in found["top"]]
            assert order == pytest.approx(sorted(p, reverse=True), rel=1e-9)
            count = min(setting[2], len(raw["rows"][i]))
            assert [one["row"] for one in found["near"]] == raw["rows"][i][:count]
            if count:
                assert sum(one["share"] for one in found["near"]) == pytest.approx(1)
