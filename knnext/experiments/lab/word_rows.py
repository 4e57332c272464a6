"""A small trained W_ds: a few rows a word, whose probabilities are summed by word.

    p(w | h) = sum over the rows j of w of softmax(W h)_j

The rows of one word lie together, so the sum over a word is a sum over a short run of columns and
M is never formed. The gradient needs one (n, R) matrix, the softmax itself, and two products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from knnext.experiments.lab import Lab
from knnext.experiments.lab.cache import settings_key
from knnext.experiments.lab.examples import Examples, layer_examples
from knnext.experiments.lab.training import Loss, Schedule, Trained, nll, trained

#: The published loss clamps a word's probability here before the logarithm; below it, no gradient.
PUBLISHED_FLOOR = 1e-9
_BLOCK_ENTRIES = 1 << 24  # states x rows at a time where no gradient is wanted


@dataclass(frozen=True)
class Layout:
    """Which rows stand for which word: `counts` (V,) int64 rows for each word, in order."""

    counts: Tensor

    def __post_init__(self) -> None:
        if self.counts.ndim != 1 or not bool((self.counts >= 1).all()):
            raise ValueError("counts must be (V,) with at least one row for every word")

    @property
    def num_rows(self) -> int:
        """R."""
        return int(self.counts.sum())

    @property
    def row_tokens(self) -> Tensor:
        """(R,) int64, the word of each row."""
        return torch.arange(len(self.counts), device="cpu").repeat_interleave(self.counts)

    def members(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(n, m) rows of each target, and (n, m) bool: places that hold no row of it."""
        counts = self.counts.to(targets.device)
        starts = (counts.cumsum(0) - counts)[targets][:, None]
        sizes = counts[targets][:, None]
        place = torch.arange(int(counts.max()), device=targets.device).expand(len(targets), -1)
        return starts + torch.minimum(place, sizes - 1), place >= sizes


def even_layout(vocab_size: int, rows: int, single: tuple[int, ...] = ()) -> Layout:
    """`rows` rows for every word but the `single` ones (special tokens), which have one."""
    counts = torch.full((vocab_size,), rows, dtype=torch.int64, device="cpu")
    counts[list(single)] = 1
    return Layout(counts)


def word_log_p(
    states: Tensor,
    rows: Tensor,
    layout: Layout,
    targets: Tensor,
    *,
    logits: Tensor | None = None,
    floor: float = 0.0,
) -> Tensor:
    """(n,) float log of the summed probability of each target's rows; differentiable.

    Args:
        states: (n, D).
        rows: (R, D), in the order of `layout`.
        targets: (n,) int64 words.
        logits: (n, R) added to W h, without gradient: a frozen part of the sum.
        floor: probabilities below it count as it and give no gradient.
    """
    members, absent = layout.members(targets)
    if torch.is_grad_enabled() and (states.requires_grad or rows.requires_grad):
        out: Tensor = _WordLogP.apply(states, rows, members, absent, logits, floor)
        return out
    parts = []
    step = max(1, _BLOCK_ENTRIES // max(1, rows.shape[0]))
    for begin in range(0, states.shape[0], step):
        part = slice(begin, begin + step)
        scores = _product(states[part], rows, None if logits is None else logits[part])
        wanted = scores.gather(1, members[part]).masked_fill_(absent[part], -torch.inf)
        parts.append(wanted.logsumexp(1) - scores.logsumexp(1))
    log_p = torch.cat(parts) if parts else states.new_zeros(0)
    return log_p.clamp_min(math.log(floor)) if floor else log_p


def _product(states: Tensor, rows: Tensor, logits: Tensor | None) -> Tensor:
    return states @ rows.T if logits is None else torch.addmm(logits, states, rows.T)


class _WordLogP(torch.autograd.Function):
    """`word_log_p` with one (n, R) matrix where autograd would make four.

    d log p(w) / d logits = (share of each row in its word) - softmax. The share is a matrix with
    few entries, and the factor of a state is put on the state, so that matrix is only read.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        rows: Tensor,
        members: Tensor,
        absent: Tensor,
        logits: Tensor | None,
        floor: float,
    ) -> Tensor:
        p = _product(states, rows, logits)
        share = p.gather(1, members).masked_fill_(absent, -torch.inf).softmax(1)
        p = torch.softmax(p, 1, out=p) if p.device.type == "cpu" else p.softmax(1)
        total = p.gather(1, members).masked_fill_(absent, 0).sum(1)
        ctx.save_for_backward(states, rows, p, members, share, total >= floor)
        return total.clamp_min(max(floor, torch.finfo(p.dtype).tiny)).log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, rows, p, members, share, above = ctx.saved_tensors
        factor = (gradient * above)[:, None]
        of_states = of_rows = None
        if ctx.needs_input_grad[0]:
            own = torch.bmm(share[:, None], rows[members])[:, 0]
            of_states = factor * (own - p @ rows)
        if ctx.needs_input_grad[1]:
            scaled = factor * states
            of_rows = -(p.T @ scaled)
            own = (share[:, :, None] * scaled[:, None]).flatten(0, 1)
            of_rows.index_add_(0, members.flatten(), own)
        return of_states, of_rows, None, None, None, None


class WordRows(nn.Module):
    """A trained W_ds of any layout on one state: learned-embedding and multi-embedding.

    Starts from N(0, D^-1/2) (a standard deviation), as the published matrices did.
    """

    def __init__(
        self, layout: Layout, dim: int, generator: torch.Generator, floor: float = 0.0
    ) -> None:
        super().__init__()
        self.layout, self.floor = layout, floor
        rows = (
            torch.randn(
                layout.num_rows, dim, generator=generator, dtype=torch.float32, device="cpu"
            )
            * dim**-0.5
        )
        self.rows = nn.Parameter(rows)

    def forward(self, states: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """(n,) log p of the targets; the floor applies in training alone."""
        floor = self.floor if self.training else 0.0
        return word_log_p(states[0], self.rows, self.layout, targets, floor=floor)


def trained_rows(
    lab: Lab,
    key_layer: str,
    layout: Layout,
    schedule: Schedule,
    *,
    seed: int = 0,
    floor: float = 0.0,
    objective: str = "cross-entropy",
    loss: Loss = nll,
    examples: Callable[[str], Examples] | None = None,
) -> Trained:
    """`WordRows` trained on the states of one layer, kept by the lab.

    `objective` names `loss` and what else `examples` holds, with all their settings, for the key.
    """
    settings = {
        "h_ds": key_layer,
        "layout": settings_key({"counts": layout.counts.tolist()}),
        "floor": floor,
        "objective": objective,
    }
    rows = layout.num_rows

    def build(generator: torch.Generator) -> WordRows:
        states = lab.states("valid", key_layer)
        return WordRows(layout, states.keys.shape[1], generator, floor)

    return trained(
        lab,
        f"{rows:,} rows on {key_layer}",
        settings,
        build,
        examples or layer_examples(lab, key_layer),
        schedule,
        seed=seed,
        loss=loss,
    )
