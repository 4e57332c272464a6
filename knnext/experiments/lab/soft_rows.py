"""M, the share of each row that goes to each word, and log p of a softmax over such rows.

A cluster's share of a word is counted from the keys in it: each key votes for the word that
followed it, with a weight of 1 or one that falls with its distance to the centroid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knnext.experiments.lab.family import row_scores

#: How much a key's vote weighs, by its squared distance: spec of the published code.
WEIGHTS = ("count", "inverse distance", "exponential")
#: Below this, a word's probability counts as it in training: the published loss clamps it here.
TRAINING_FLOOR = 1e-9

_BLOCK_ENTRIES = 1 << 24


@dataclass(frozen=True)
class SoftRows:
    """M in sparse form, by word: word v has entries `offsets[v]` to `offsets[v + 1]`.

    Attributes:
        offsets: (V + 1,) int64.
        rows: (E,) int64, the row of each entry.
        log_shares: (E,) float32, log M[v, row].
    """

    offsets: Tensor
    rows: Tensor
    log_shares: Tensor

    def entries(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(place, row, log share), each (e,): the entries of (n,) targets, `place` in 0 .. n-1."""
        begin, sizes = self.offsets[targets], (self.offsets[1:] - self.offsets[:-1])[targets]
        place = torch.arange(len(targets), device=targets.device).repeat_interleave(sizes)
        within = torch.arange(len(place), device=targets.device) - (sizes.cumsum(0) - sizes)[place]
        entry = begin[place] + within
        return place, self.rows[entry], self.log_shares[entry]

    def to(self, device: str | torch.device) -> SoftRows:
        """The same on a device."""
        return SoftRows(self.offsets.to(device), self.rows.to(device), self.log_shares.to(device))

    def dense(self, num_rows: int) -> Tensor:
        """(V, R) M itself; for small ones."""
        m = torch.zeros(len(self.offsets) - 1, num_rows, dtype=torch.float32, device="cpu")
        word, row, log_share = self.entries(torch.arange(len(m), device="cpu"))
        m[word, row] = log_share.exp()
        return m


def one_hot_rows(words: Tensor, vocab_size: int) -> SoftRows:
    """M of rows that stand for one word each, (R,)."""
    return _sparse(
        words,
        torch.arange(len(words), device="cpu"),
        torch.ones(len(words), dtype=torch.float32, device="cpu"),
        vocab_size,
    )


def voted_rows(
    clusters: Tensor, squares: Tensor, words: Tensor, vocab_size: int, weights: str
) -> SoftRows:
    """M = P(word | cluster) from (n,) clusters, squared distances and words of keys.

    Args:
        weights: `"count"`; `"inverse distance"`: 1 / (d^2 + 0.01); `"exponential"`:
            exp(-d^2 + the smallest d^2 of the cluster).
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    squares = squares.double()
    if weights == "count":
        votes = torch.ones_like(squares)
    elif weights == "inverse distance":
        votes = 1 / (squares + 0.01)
    else:
        count = int(clusters.max()) + 1
        nearest = torch.full((count,), torch.inf, dtype=torch.float64, device="cpu")
        nearest.scatter_reduce_(0, clusters, squares, "amin")
        votes = (nearest[clusters] - squares).exp()
    total = torch.zeros(int(clusters.max()) + 1, dtype=torch.float64, device="cpu").index_add_(
        0, clusters, votes
    )
    return _sparse(words, clusters, votes / total[clusters], vocab_size)


def _sparse(words: Tensor, rows: Tensor, shares: Tensor, vocab_size: int) -> SoftRows:
    count = int(rows.max()) + 1
    pairs, place = (words.long() * count + rows).unique(return_inverse=True)
    summed = torch.zeros(len(pairs), dtype=torch.float64, device="cpu").index_add_(
        0, place, shares.double()
    )
    pairs, summed = pairs[summed > 0], summed[summed > 0]
    sizes = (pairs // count).bincount(minlength=vocab_size)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), sizes.cumsum(0)])
    return SoftRows(offsets, pairs % count, summed.log().float())


def soft_log_p(scores: Tensor, words: SoftRows, targets: Tensor, normalizer: Tensor) -> Tensor:
    """(n,) log sum over rows of M[target, row] exp(score - normalizer); -inf without an entry.

    Args:
        scores: (n, R) after the temperature. Differentiable, as is the normalizer (n,).
    """
    place, row, log_share = words.entries(targets)
    terms = scores[place, row] - normalizer[place] + log_share
    top = torch.full_like(normalizer, -torch.inf).detach()
    top = top.scatter_reduce(0, place, terms.detach(), "amax")
    safe = top.masked_fill(top == -torch.inf, 0)
    total = torch.zeros_like(normalizer).index_add(0, place, (terms - safe[place]).exp())
    return total.log() + safe


def tempered_log_p(
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    words: Mapping[str, SoftRows],
    *,
    metric: str,
    temperatures: Sequence[float],
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """(temperatures, n) float64 log p of the targets, by the names of several M.

    Equal to `family.row_log_p` for each temperature and M, at one product of states and rows.
    """
    rows = rows.to(device)
    placed = {name: one.to(device) for name, one in words.items()}
    shape = (len(temperatures), len(targets))
    out = {name: torch.empty(shape, dtype=torch.float64, device="cpu") for name in words}
    step = max(1, _BLOCK_ENTRIES // len(rows))
    for begin in range(0, len(targets), step):
        part = slice(begin, begin + step)
        raw = row_scores(states[part].to(device), rows, metric)
        wanted = targets[part].to(device)
        for number, temperature in enumerate(temperatures):
            scores = raw / temperature
            normalizer = scores.logsumexp(1)
            for name, one in placed.items():
                log_p = soft_log_p(scores, one, wanted, normalizer)
                out[name][number, part] = log_p.double().cpu()
    return out


class TrainedRows(nn.Module):
    """Rows with a fixed M, trained from given ones: `knnext.experiments.lab.training.Component`."""

    def __init__(self, rows: Tensor, words: SoftRows, metric: str, temperature: float) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone().float())
        self.words, self.metric, self.temperature = words, metric, temperature

    def forward(self, states: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """(n,) log p of the targets; -inf for a word without a row."""
        if self.words.rows.device != targets.device:
            self.words = self.words.to(targets.device)
        scores = row_scores(states[0], self.rows, self.metric) / self.temperature
        return soft_log_p(scores, self.words, targets, scores.logsumexp(1))


def floored_nll(log_p: Tensor, _examples: object) -> Tensor:
    """Mean cross-entropy in nats, a word's probability counting as 1e-9 at least."""
    floor = math.log(TRAINING_FLOOR)
    return -log_p.clamp_min(floor).mean()
