"""Which classes of a linear layer can be the argmax at all ("stolen probabilities").

Class i is the argmax of W x + b for some x iff (W_j - W_i) x + b_j - b_i < 0 for all j. Without a
bias that fails exactly where W_i lies in the convex hull of the other rows. Cheap guesses settle
nearly all classes; the rest goes to a linear program, the Chebyshev centre of the class's cell:

    maximize r  with  u_j x + r <= -(b_j - b_i) / |W_j - W_i|,  |x| <= bound,

u_j the unit vector along W_j - W_i (Grivas et al., 2022). Whatever proposes an x, only an argmax
computed from W settles a class for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from knnext.errors import missing_package

BOUND = 100.0
SMALLEST_RADIUS = 1e-8
#: How a class can be settled, in the order in which it is tried; the last two find no x.
STAGES = ("embedding", "centred", "reflection", "linear program", "stolen", "open")

_BLOCK_ENTRIES = 1 << 24
_ADDED_ROWS = 64
_HULL_TOLERANCE = 1e-6


@dataclass
class Settled:
    """What is known of each tested class.

    Attributes:
        classes: (m,) int64.
        stages: one of `STAGES` a class. "stolen": the program has no cell of radius above 1e-8.
            "open": neither a state nor a proof was found.
        states: (m, D) float64, where the class is the only argmax; nan without one.
        hull_errors: of the stolen classes, how far the hull's nearest proven point is from W_i,
            as a share of the distance to the rows that span it; above 1e-6 it is no proof (the
            bound on x may be what keeps the class down).
    """

    classes: Tensor
    stages: list[str]
    states: Tensor
    hull_errors: dict[int, float] = field(default_factory=dict)

    def count(self, stage: str) -> int:
        """Classes settled at a stage."""
        return self.stages.count(stage)

    @property
    def proven(self) -> int:
        """Stolen classes written as a mean of other rows, to 1e-6."""
        return sum(error <= _HULL_TOLERANCE for error in self.hull_errors.values())


def settle_classes(
    weight: Tensor,
    bias: Tensor | None = None,
    classes: Tensor | None = None,
    *,
    steps: int = 100,
    guesses: bool = True,
    bound: float = BOUND,
    tick: Callable[[], None] = lambda: None,
) -> Settled:
    """Settle classes of a (V, D) weight and a (V,) bias, by guesses first and then exactly.

    Args:
        weight, bias: of the layer; all arithmetic is in float64.
        classes: (m,) int64; all by default.
        steps: reflections that are tried before the linear program.
        guesses: False sends every class to the linear program.
        bound: of each coordinate of x.
        tick: called after each linear program.
    """
    weight = weight.double()
    bias = (
        torch.zeros(len(weight), dtype=torch.float64, device="cpu")
        if bias is None
        else bias.double()
    )
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"weight must be (V, D) and bias (V,), got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )
    classes = torch.arange(len(weight), device="cpu") if classes is None else classes
    nowhere = torch.full(
        (len(classes), weight.shape[1]), torch.nan, dtype=torch.float64, device="cpu"
    )
    test = Settled(classes, ["open"] * len(classes), nowhere)
    if guesses:
        _guess(test, weight, bias, steps, bound)
    for number, index in enumerate(classes.tolist()):
        if test.stages[number] == "open":
            _solve(test, number, weight, bias, index, bound)
            tick()
    return test


def is_argmax(weight: Tensor, bias: Tensor, states: Tensor, classes: Tensor) -> Tensor:
    """(m,) bool: whether class i is the only argmax under its (m, D) state, ties excluded."""
    return _margins(weight, bias, states, classes)[0] > 0


def _margins(
    weight: Tensor, bias: Tensor, states: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """(m,) by how much a class leads, and (m,) the strongest of the others."""
    margins, rivals = [], []
    for part in torch.arange(len(classes), device="cpu").split(
        max(1, _BLOCK_ENTRIES // len(weight))
    ):
        logits = states[part] @ weight.T + bias
        own = logits.gather(1, classes[part, None])
        best, rival = logits.scatter(1, classes[part, None], -torch.inf).max(1)
        margins.append(own[:, 0] - best)
        rivals.append(rival)
    return torch.cat(margins), torch.cat(rivals)


def _guess(test: Settled, weight: Tensor, bias: Tensor, steps: int, bound: float) -> None:
    """x = W_i, x = W_i - mean, then reflections across the hyperplane of the strongest rival."""
    centred = weight - weight.mean(0)
    for stage, start in (("embedding", weight), ("centred", centred)):
        _keep(test, weight, bias, stage, _to_bound(start[test.classes], bound))
    open_ = _open(test)
    states = _to_bound(centred[test.classes[open_]], bound)
    for _ in range(steps):
        if not len(open_):
            return
        classes = test.classes[open_]
        margins, rivals = _margins(weight, bias, states, classes)
        away = weight[rivals] - weight[classes]
        norms = away.norm(dim=1, keepdim=True).clamp_min(1e-300)
        # Past the mirror image by a little: on the hyperplane itself the image stands still.
        length = 2 * (-margins).clamp_min(0)[:, None] / norms + 1e-3 * states.norm(
            dim=1, keepdim=True
        )
        states = (states - length * away / norms).clamp(-bound, bound)
        _keep(test, weight, bias, "reflection", states, open_)
        left = torch.tensor(
            [test.stages[n] == "open" for n in open_.tolist()], dtype=torch.bool, device="cpu"
        )
        open_, states = open_[left], states[left]


def _to_bound(states: Tensor, bound: float) -> Tensor:
    """As long as the bound allows: a bias weighs least there."""
    return states * (bound / states.abs().amax(1, keepdim=True).clamp_min(1e-300))


def _open(test: Settled) -> Tensor:
    return torch.tensor(
        [n for n, s in enumerate(test.stages) if s == "open"], dtype=torch.int64, device="cpu"
    )


def _keep(
    test: Settled,
    weight: Tensor,
    bias: Tensor,
    stage: str,
    states: Tensor,
    numbers: Tensor | None = None,
) -> None:
    """Note the open classes that lead under their states, one a class or one a number."""
    numbers = torch.arange(len(test.classes), device="cpu") if numbers is None else numbers
    leads = is_argmax(weight, bias, states, test.classes[numbers])
    for place in leads.nonzero()[:, 0].tolist():
        number = int(numbers[place])
        if test.stages[number] == "open":
            test.stages[number], test.states[number] = stage, states[place]


def _solve(
    test: Settled, number: int, weight: Tensor, bias: Tensor, index: int, bound: float
) -> None:
    """The linear program of one class, by cutting planes.

    It starts with the strongest rivals and adds those that a solution forgot. A program with fewer
    rows has a radius at least as large, so a radius of 0 proves the whole; and an x that wins the
    argmax needs no further row.
    """
    others = torch.arange(len(weight), device="cpu") != index
    normals, gaps = (weight - weight[index])[others], (bias[index] - bias)[others]
    norms = normals.norm(dim=1)
    if bool(((norms == 0) & (gaps <= 0)).any()):
        test.stages[number], test.hull_errors[index] = "stolen", 0.0  # a double of another row
        return
    usable = norms > 0
    units, sides = normals[usable] / norms[usable, None], (gaps / norms.clamp_min(1e-300))[usable]
    norms = norms[usable]
    chosen = torch.zeros(len(units), dtype=torch.bool, device="cpu")
    excess = units @ _to_bound(weight[index, None], bound)[0] - sides
    while True:
        worst = excess.masked_fill(chosen, -torch.inf).topk(min(_ADDED_ROWS, len(units))).indices
        chosen[worst] = True
        solution = _chebyshev(units[chosen].numpy(), sides[chosen].numpy(), bound)
        if solution is None:
            return
        state, radius, duals = solution
        if radius <= SMALLEST_RADIUS:
            test.stages[number] = "stolen"
            test.hull_errors[index] = _hull_error(units[chosen], norms[chosen], duals)
            return
        if bool(
            is_argmax(
                weight, bias, state[None], torch.tensor([index], dtype=torch.int64, device="cpu")
            )
        ):
            test.stages[number], test.states[number] = "linear program", state
            return
        excess = units @ state + radius - sides
        if not bool((excess > 1e-9)[~chosen].any()):
            return  # all rows are in, yet the state does not win: rounding, left open


def _chebyshev(
    units: np.ndarray, sides: np.ndarray, bound: float
) -> tuple[Tensor, float, Tensor] | None:
    """(x, r, weights of the rows) of max r with units x + r <= sides; None if HiGHS gave up."""
    try:
        from scipy.optimize import linprog
    except ImportError:
        raise missing_package("the linear program needs", "scipy", "lm") from None
    dim = units.shape[1]
    rows = np.hstack([units, np.ones((len(units), 1))])
    bounds = [(-bound, bound)] * dim + [(None, None)]
    found = linprog(np.eye(dim + 1)[dim] * -1.0, rows, sides, bounds=bounds, method="highs")
    if found.status != 0:
        return None
    x = torch.from_numpy(found.x)
    return x[:dim].clone(), float(x[dim]), torch.from_numpy(-found.ineqlin.marginals)


def _hull_error(units: Tensor, norms: Tensor, duals: Tensor) -> float:
    """|sum_j a_j W_j - W_i| over sum_j a_j |W_j - W_i|, a from the program's duals."""
    shares = duals.clamp_min(0) / norms
    if not float(shares.sum()) > 0:
        return float("inf")
    offset = (shares * norms)[:, None] * units
    return float(offset.sum(0).norm() / (shares * norms).sum())
