"""tune against the plain formula on every grid point, planted optima, and the picture."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from knnext.evaluation.scores import StreamScores
from knnext.evaluation.tune import (
    DEFAULT_LMBDAS,
    DEFAULT_TEMPERATURES,
    PAPER_LMBDAS,
    PAPER_TEMPERATURES,
    mixture_nll,
    tune,
)

INF = float("inf")


def random_scores(n: int = 200, k: int = 12, vocab: int = 6, seed: int = 0) -> StreamScores:
    """Neighbors that are right more often the nearer they are; a few rows without any."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, (n,), generator=generator)
    distances = (torch.rand(n, k, generator=generator) * 8).sort().values
    right = torch.rand(n, k, generator=generator) < torch.exp(-distances / 4)
    other = torch.randint(0, vocab, (n, k), generator=generator)
    tokens = torch.where(right, targets[:, None], other).to(torch.int32)
    tokens[::50], distances[::50] = -1, INF
    return StreamScores(
        log_p_lm=torch.rand(n, generator=generator).clamp_min(0.01).log(),
        targets=targets,
        document_ids=torch.arange(n) // 20,
        ends_document=torch.zeros(n, dtype=torch.bool),
        distances=distances,
        tokens=tokens,
    )


def plain_nll(scores: StreamScores, temperature: float, lmbda: float) -> float:
    """The definition, with no regard for speed or range."""
    weights = torch.exp(-scores.distances.double() / temperature)
    match = scores.tokens == scores.targets[:, None]
    p_knn = (weights * match).sum(1) / weights.sum(1)
    p_lm = scores.log_p_lm.double().exp()
    mixed = torch.where(p_knn.isnan(), p_lm, (1 - lmbda) * p_lm + lmbda * p_knn)
    return -float(mixed.log().mean())


def test_surface_is_the_plain_formula_everywhere() -> None:
    scores = random_scores()
    temperatures, lmbdas = [0.3, 1.0, 4.0, 30.0], [0.0, 0.001, 0.3, 0.77, 0.999, 1.0]
    result = tune(scores, temperatures, lmbdas)
    for i, temperature in enumerate(temperatures):
        for j, lmbda in enumerate(lmbdas):
            want = plain_nll(scores, temperature, lmbda)
            assert result.surface[i, j] == pytest.approx(want, rel=1e-6), (temperature, lmbda)
    assert result.base_nll == pytest.approx(plain_nll(scores, 1.0, 0.0))
    assert result.base_perplexity == pytest.approx(math.exp(result.base_nll))
    assert result.num_tokens == 200 and result.seconds > 0


def test_without_refining_the_best_is_the_grids() -> None:
    result = tune(random_scores(), refine=False)
    assert result.nll == result.surface.min()
    i, j = np.unravel_index(result.surface.argmin(), result.surface.shape)
    assert result.temperature == result.temperatures[i] and result.lmbda == result.lmbdas[j]


def test_refining_finds_what_a_fine_grid_finds() -> None:
    scores = random_scores()
    coarse = tune(scores, np.geomspace(0.1, 100, 7), np.linspace(0, 1, 5))
    fine = tune(scores, np.geomspace(0.1, 100, 150), np.linspace(0, 1, 201), refine=False)
    assert coarse.nll <= coarse.surface.min()
    assert coarse.nll == pytest.approx(fine.nll, abs=2e-5)
    assert coarse.lmbda == pytest.approx(fine.lmbda, abs=0.01)
    assert coarse.temperature == pytest.approx(fine.temperature, rel=0.05)
    assert plain_nll(scores, coarse.temperature, coarse.lmbda) == pytest.approx(coarse.nll)


def test_a_planted_weight_is_found() -> None:
    """One half of the tokens only the neighbors know, one half only the model: lmbda 1/2."""
    n = 100
    half = torch.arange(n) < n // 2
    scores = StreamScores(
        log_p_lm=torch.where(half, math.log(1e-9), 0.0),
        targets=torch.zeros(n, dtype=torch.int64),
        document_ids=torch.zeros(n, dtype=torch.int64),
        ends_document=torch.zeros(n, dtype=torch.bool),
        distances=torch.zeros(n, 1),
        tokens=torch.where(half, 0, 1).to(torch.int32)[:, None],
    )
    result = tune(scores)
    assert result.lmbda == pytest.approx(0.5, abs=1e-4)
    assert result.nll == pytest.approx(math.log(2), abs=1e-6)
    assert result.base_nll == pytest.approx(-math.log(1e-9) / 2, rel=1e-5)


def test_useless_neighbors_get_no_weight() -> None:
    scores = random_scores()
    scores.tokens[scores.tokens >= 0] = 77
    result = tune(scores)
    assert result.lmbda == pytest.approx(0, abs=1e-6) and result.nll == result.base_nll
    assert "lowest lmbda" not in result.edges  # no weight is an answer, not an end of the grid


def test_an_optimum_at_the_edge_is_said() -> None:
    scores = random_scores()
    inside = tune(scores)
    assert inside.edges == ()
    low = tune(scores, [inside.temperature * 20, inside.temperature * 40], [0.1, 0.2, 0.3])
    assert "lowest temperature" in low.edges
    high = tune(scores, [inside.temperature / 4, inside.temperature / 2])
    assert high.edges == ("highest temperature",)
    light = tune(scores, [inside.temperature], [0.001, 0.002])
    assert light.edges == ("highest lmbda",)
    # Refining stays inside the range that was asked for.
    assert low.temperature >= inside.temperature * 20 and light.lmbda <= 0.002


def test_tiny_probabilities_do_not_underflow() -> None:
    lm = torch.tensor([-1500.0, -3.0, -1500.0]).double()
    knn = torch.tensor([-1400.0, -INF, -INF]).double()
    found = mixture_nll(lm, knn, np.array([0.0, 0.5, 1.0]))
    assert found[0] == pytest.approx(3003 / 3)
    assert found[1] == pytest.approx((1400 + 3 + 1500 + 3 * math.log(2)) / 3)
    assert found[2] == INF
    nothing = torch.tensor([-INF, -1.0]).double()
    assert mixture_nll(nothing, nothing, np.array([0.3])).tolist() == [INF]


def test_grids() -> None:
    assert PAPER_TEMPERATURES.tolist() == [round(0.1 * i, 1) for i in range(1, 31)]
    assert len(PAPER_LMBDAS) == 200
    assert (PAPER_LMBDAS[0], PAPER_LMBDAS[-1]) == pytest.approx((0.001, 0.999))
    assert DEFAULT_TEMPERATURES[0] == pytest.approx(0.1)
    assert DEFAULT_TEMPERATURES[-1] == pytest.approx(1000)
    assert DEFAULT_LMBDAS[0] == 0
    shuffled = tune(random_scores(), [3.0, 1.0, 3.0], [0.5, 0.1], refine=False)
    assert shuffled.temperatures.tolist() == [1.0, 3.0] and shuffled.surface.shape == (2, 2)


def test_bad_grids() -> None:
    scores = random_scores(20)
    for temperatures, lmbdas, words in (
        ([0.0, 1.0], [0.5], "temperature must be positive"),
        ([float("nan")], [0.5], "temperature"),
        ([1.0], [1.2], r"lmbda must lie in \[0, 1\]"),
        ([], [0.5], "temperatures must hold"),
        ([1.0], [], "lmbdas must hold"),
    ):
        with pytest.raises(ValueError, match=words):
            tune(scores, temperatures, lmbdas)
    empty = random_scores(1)
    for name in ("log_p_lm", "targets", "document_ids", "ends_document", "distances", "tokens"):
        setattr(empty, name, getattr(empty, name)[:0])
    with pytest.raises(ValueError, match="no tokens"):
        tune(empty)


def test_as_json() -> None:
    result = tune(random_scores(40), [1.0, 2.0], [0.0, 0.5, 1.0], refine=False)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["perplexity"] == pytest.approx(result.perplexity)
    assert data["nll"][0][1] == pytest.approx(result.surface[0, 1])
    assert (data["nll"][0][2] is None) == math.isinf(result.surface[0, 2])


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_the_picture(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    from knnext.report.plots import plot_surface

    path = tmp_path / f"surface{ending}"
    result = tune(random_scores())
    figure = plot_surface(result, path)
    axes = figure.axes[0]
    assert path.stat().st_size > 10_000
    marker = axes.lines[-1]
    assert marker.get_xdata()[0] == result.temperature and marker.get_ydata()[0] == result.lmbda
    assert axes.get_xscale() == "log"
    assert f"{result.base_perplexity:.3g}" in axes.get_title(loc="left")
    with pytest.raises(ValueError, match="two temperatures"):
        plot_surface(tune(random_scores(20), [1.0], [0.1, 0.2]))


def test_tuning_does_not_load_matplotlib() -> None:
    code = "import knnext.report.plots, sys; knnext.tune; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
