"""One search for all that is read in a step, and the mixture of each row by its own settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knnext.ops import knn_interpolate, knn_target_log_prob

if TYPE_CHECKING:
    from knnext.index.base import Index


@dataclass(frozen=True)
class Mixture:
    """How neighbors are mixed in: as `knnext.KNNLM` has it."""

    k: int
    temperature: float
    lmbda: float


@dataclass(frozen=True)
class Found:
    """Neighbors of n rows. Each row is mixed by numbers of its own, whoever stands beside it.

    Attributes:
        distances, tokens: (n, k) float32 and int32; -1 where there is no neighbor.
        temperature, lmbda: (n,) float32.
    """

    distances: Tensor
    tokens: Tensor
    temperature: Tensor
    lmbda: Tensor

    def __getitem__(self, rows: slice | list[int]) -> Found:
        parts = (self.distances, self.tokens, self.temperature, self.lmbda)
        return Found(*(part[rows] for part in parts))

    def log_p(self, logits: Tensor) -> Tensor:
        """(n, V) float32 log p of the mixture, from (n, V) logits."""
        return knn_interpolate(
            logits.to(self.distances.device), self.distances, self.tokens,
            self.temperature, self.lmbda,
        )  # fmt: skip

    def shares(self, targets: Tensor, log_p: Tensor) -> Tensor:
        """(n,) the part of p of each target (n,) that is the neighbors': lmbda p_knn / p."""
        log_knn = knn_target_log_prob(self.distances, self.tokens, targets, self.temperature)
        shares = (self.lmbda.log() + log_knn - log_p).exp()
        return shares.nan_to_num(nan=0.0).clamp(0, 1)


class Mixer:
    """Searches an index for the states of a step.

    Attributes:
        searches: how often the index was asked.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._dtype = getattr(getattr(index, "datastore", None), "dtype", None)
        self.searches = 0

    def search(self, states: Tensor, mixtures: Sequence[Mixture], rows: int) -> Found:
        """The neighbors of (n, D) states; of rows with lmbda = 0 none are looked for.

        At most so many ``rows`` are searched at once, which bounds what a search holds.
        """
        device = states.device
        counts = torch.tensor([m.k for m in mixtures], dtype=torch.int64, device="cpu")
        lmbda = torch.tensor([m.lmbda for m in mixtures], dtype=torch.float32, device="cpu")
        temperature = torch.tensor(
            [m.temperature for m in mixtures], dtype=torch.float32, device="cpu"
        )
        asked = lmbda.nonzero()[:, 0]
        most = int(counts[asked].max()) if len(asked) else 1
        distances = torch.full((len(states), most), torch.inf, dtype=torch.float32, device=device)
        tokens = torch.full((len(states), most), -1, dtype=torch.int32, device=device)
        for part in asked.split(rows):
            self.searches += 1
            places = part.to(device)
            queries = states[places]
            queries = queries if self._dtype is None else queries.to(self._dtype)
            found, indices = self.index.search(queries, most)
            # Of a row that asked for fewer, the nearest.
            beyond = torch.arange(most, device="cpu") >= counts[part][:, None]
            near = self.index.tokens(indices).to(device).masked_fill(beyond.to(device), -1)
            distances[places], tokens[places] = found.to(device), near.to(tokens.dtype)
        return Found(distances, tokens, temperature.to(device), lmbda.to(device))
