"""The family of models that the experiments move in, and its dense members.

    p = (1 - lmbda) softmax(W_sm h_sm) + lmbda M softmax(mask_k(W_ds (x) h_ds) / t)

`Setting` names one member. Where W_ds is a datastore, mask_k makes the sum sparse and a search
finds its terms (`Lab.neighbors`); where W_ds is a small matrix, mask_k is dropped and `row_log_p`
computes the whole: V rows (learned-embedding), nV rows (multi-embedding) or centroids
(clustering).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_BLOCK_ENTRIES = 1 << 24  # states x rows at a time: 64 MiB of float32


@dataclass(frozen=True)
class Setting:
    """One member of the family.

    Attributes:
        w_ds: `"datastore"` (N rows), `"embedding"` (V rows), `"multi-embedding"` (n V rows),
            `"centroids"` (K rows) or `"none"`: no second component, the base LM.
        h_ds: the state that is compared, `"att"` or `"ffn"`.
        metric: the product: `"l2"` (minus the squared distance) or `"ip"`.
        mask: which rows are kept: `"exact"` (the true k nearest), `"faiss"`, or `"none"` (all).
        score: `"real"` (from the stored keys) or `"faiss"` (from the index's codes).
        temperature: t, or None: fitted on the validation split.
        m: how a row's probability goes to tokens: `"one-hot"` (the row's own token) or
            `"soft"` (a distribution over tokens for each row).
        fraction: of the datastore that is used.
        padding: zero rows added, as a share of all rows (0.264 in the published store).
    """

    w_ds: str = "datastore"
    h_ds: str = "att"
    metric: str = "l2"
    mask: str = "exact"
    score: str = "real"
    temperature: float | None = None
    m: str = "one-hot"
    fraction: float = 1.0
    padding: float = 0.0

    def __post_init__(self) -> None:
        allowed = {
            "w_ds": ("datastore", "embedding", "multi-embedding", "centroids", "none"),
            "metric": ("l2", "ip"),
            "mask": ("exact", "faiss", "none"),
            "score": ("real", "faiss"),
            "m": ("one-hot", "soft"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")
        if not 0 < self.fraction <= 1 or not 0 <= self.padding < 1:
            raise ValueError(
                f"fraction must lie in (0, 1] and padding in [0, 1), got {self.fraction} and "
                f"{self.padding}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for results and cache keys."""
        return asdict(self)


def row_scores(states: Tensor, rows: Tensor, metric: str) -> Tensor:
    """(n, R) scores of (n, D) states against (R, D) rows, larger is nearer, in float32.

    `"ip"`: the inner product. `"l2"`: minus the squared distance, not its root, without any
    factor (spec of the paper's code: 2 <h, w> - |h|^2 - |w|^2).
    """
    states, rows = states.float(), rows.float()
    product = states @ rows.T
    if metric == "ip":
        return product
    if metric != "l2":
        raise ValueError(f"metric must be 'l2' or 'ip', got {metric!r}")
    squares = states.square().sum(1, keepdim=True) + rows.square().sum(1)
    return (2 * product - squares).clamp_max(0)


def row_log_p(
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    row_tokens: Tensor | None = None,
    row_distribution: Callable[[Tensor], Tensor] | None = None,
    metric: str = "ip",
    temperature: float = 1.0,
) -> Tensor:
    """(n,) float64 log of [M softmax(W h / t)](target), for a W that fits in memory.

    Args:
        states: (n, D) h_ds.
        rows: (R, D) W_ds.
        targets: (n,) int64 tokens.
        row_tokens: (R,) int64, the token of each row: M is one-hot, and the probabilities of a
            token's rows are summed. By default row i stands for token i.
        row_distribution: for a soft M: (m,) targets -> (m, R) the share M[target, row].
        metric: see `row_scores`.
        temperature: t, positive.

    Returns:
        -inf where no row gives the target anything.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    tokens = torch.arange(rows.shape[0], device="cpu") if row_tokens is None else row_tokens
    out = torch.empty(states.shape[0], dtype=torch.float64, device="cpu")
    step = max(1, _BLOCK_ENTRIES // max(1, rows.shape[0]))
    for begin in range(0, states.shape[0], step):
        part = slice(begin, begin + step)
        log_q = (row_scores(states[part], rows, metric) / temperature).log_softmax(1)
        wanted = targets[part].to(log_q.device)
        if row_distribution is not None:
            log_q = log_q + row_distribution(wanted).to(log_q).log()
        else:
            log_q = log_q.masked_fill(tokens.to(log_q.device) != wanted[:, None], -torch.inf)
        out[part] = log_q.logsumexp(1).double().cpu()
    return out
