"""A distribution cut to its m most probable tokens and renormalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ENTRIES = 1 << 24  # tokens x vocabulary at a time: 64 MiB of float32


@dataclass(frozen=True)
class Cuts:
    """What every cut gives to the targets, from one pass over the distributions.

    Attributes:
        kept: m of each cut, ascending.
        log_p: (cuts, n) float64; -inf where the target is cut away.
        mass: (cuts,) mean probability that is kept.
        entropy: (n,) float64 of the whole distribution, nats.
        rank: (n,) int64 tokens before the target; at equal logits lower ids come first.
    """

    kept: tuple[int, ...]
    log_p: Tensor
    mass: Tensor
    entropy: Tensor
    rank: Tensor


def cut(
    states: Tensor, output: Tensor, bias: Tensor | None, targets: Tensor, kept: Sequence[int]
) -> Cuts:
    """Cut the softmax of `states @ output.T + bias` to each of `kept` tokens.

    Args:
        states: (n, D) last states.
        output: (V, D) output embedding; `bias` (V,) or None.
        targets: (n,) int64.
        kept: numbers of tokens, from 1 to V.
    """
    vocab = output.shape[0]
    sizes = tuple(sorted(set(kept)))
    if not sizes or not 1 <= sizes[0] <= sizes[-1] <= vocab:
        raise ValueError(f"kept must hold numbers from 1 to the {vocab} tokens, got {tuple(kept)}")
    step = max(1, _BLOCK_ENTRIES // vocab)
    parts = []
    for begin in range(0, states.shape[0], step):
        part = slice(begin, begin + step)
        logits = states[part].float() @ output.T
        parts.append(_cut_block(logits if bias is None else logits + bias, targets[part], sizes))
    log_p, mass, entropy, rank = (list(column) for column in zip(*parts, strict=True))
    return Cuts(
        sizes, torch.cat(log_p, 1), torch.cat(mass, 1).mean(1), torch.cat(entropy), torch.cat(rank)
    )


def target_log_p(
    states: Tensor, output: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> Tensor:
    """(n,) float64 log-probability of the targets under softmax(logits / temperature)."""
    step = max(1, _BLOCK_ENTRIES // output.shape[0])
    parts = []
    for begin in range(0, states.shape[0], step):
        part = slice(begin, begin + step)
        logits = states[part].float() @ output.T
        logits = (logits if bias is None else logits + bias) / temperature
        parts.append(logits.log_softmax(1).gather(1, targets[part, None])[:, 0].double())
    return torch.cat(parts)


def _cut_block(
    logits: Tensor, targets: Tensor, kept: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_p = logits.log_softmax(1)
    target = log_p.gather(1, targets[:, None])
    ids = torch.arange(log_p.shape[1], device="cpu")
    before = (log_p > target) | ((log_p == target) & (ids < targets[:, None]))
    rank = before.sum(1)
    entropy = -(log_p.exp() * log_p).sum(1).double()
    # The vocabulary is sorted only as far as the largest cut that is not the whole of it.
    longest = max((m for m in kept if m < log_p.shape[1]), default=1)
    mass = log_p.topk(longest, 1).values.double().exp().cumsum(1)
    columns = [
        torch.ones(len(rank), dtype=torch.float64, device="cpu")
        if m == log_p.shape[1]
        else mass[:, m - 1]
        for m in kept
    ]
    masses = torch.stack(columns)
    inside = rank < torch.tensor(kept, dtype=torch.int64, device="cpu")[:, None]
    cut_log_p = (target[:, 0].double() - masses.log()).masked_fill(~inside, -torch.inf)
    return cut_log_p, masses, entropy, rank
