"""Training a whole language model further, or a student of another: blocks, loss and evaluation.

`knnext.lm.train` trains the base LM on the next token. Here the loss is free (soft labels know
their positions in the stream), and dropout can be off, as it must be for memorizing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from knnext.experiments.lab import EVALUATED, Lab
from knnext.experiments.lab.passes import run_model
from knnext.progress import progress

if TYPE_CHECKING:
    from knnext.corpus import TokenizedDocuments

#: The scalar to minimize, from (n, V) logits and the (n,) stream positions at which they stand.
BlockLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BlockSchedule:
    """AdamW over blocks of one stream: warm-up, then a cosine to `min_rate` of the peak."""

    steps: int
    block_size: int
    batch_size: int = 4
    learning_rate: float = 2e-3
    warmup: float = 0.1
    min_rate: float = 0.1
    weight_decay: float = 0.1

    def rate(self, step: int) -> float:
        """The learning rate at a step, from 0."""
        rising = self.warmup * self.steps
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        along = (step - rising) / max(1.0, self.steps - rising)
        left = self.min_rate + (1 - self.min_rate) * 0.5 * (1 + math.cos(math.pi * along))
        return self.learning_rate * left


def next_token_loss(tokens: Tensor) -> BlockLoss:
    """Cross-entropy with the token after each position of a (T,) stream."""

    def loss(logits: Tensor, positions: Tensor) -> Tensor:
        targets = tokens[positions + 1].long().to(logits.device)
        return nn.functional.cross_entropy(logits.float(), targets)

    return loss


def passes(count: int, block_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Starts of blocks, one tensor a pass, in random order and cut elsewhere in each pass."""
    while True:
        shift = int(
            torch.randint(
                min(block_size, count - block_size), (1,), generator=generator, device="cpu"
            )
        )
        starts = torch.arange(shift, count - block_size, block_size, device="cpu")
        yield starts[torch.randperm(len(starts), generator=generator, device="cpu")]


def batches(starts: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Starts (size,) without end, across the ends of passes."""
    held = torch.empty(0, dtype=torch.int64, device="cpu")
    while True:
        while len(held) < size:
            held = torch.cat([held, next(starts)])
        yield held[:size]
        held = held[size:]


def new_optimizer(model: nn.Module, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, norms) are not decayed."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    starts: Tensor,
    block_size: int,
    loss: BlockLoss,
) -> float:
    """One step on the blocks at `starts` of a (T,) stream; the loss before it."""
    device = next(model.parameters()).device
    positions = starts[:, None] + torch.arange(block_size, device="cpu")
    logits = model(input_ids=tokens[positions].long().to(device), use_cache=False).logits
    value = loss(logits.flatten(0, 1), positions.flatten())
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(value.detach())


def train_blocks(
    model: nn.Module,
    tokens: Tensor,
    starts: Iterator[Tensor],
    schedule: BlockSchedule,
    loss: BlockLoss,
) -> list[float]:
    """Train in place, dropout as the model has it; the loss of each step."""
    optimizer = new_optimizer(model.train(), schedule.learning_rate, schedule.weight_decay)
    source = batches(starts, schedule.batch_size)
    losses = []
    with progress(schedule.steps, "train", unit="steps") as bar:
        for number in range(schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(number)
            chosen = next(source)
            losses.append(step(model, optimizer, tokens, chosen, schedule.block_size, loss))
            bar.update(1)
    model.eval()
    return losses


def score_splits(lab: Lab, model: nn.Module) -> dict[str, Tensor]:
    """(n,) float64 log p of the targets of `"valid"` and `"test"` under a model, in the windows
    in which the lab's own LM reads."""
    return {split: score_text(lab, model, lab.text(split)) for split in EVALUATED}


def score_text(lab: Lab, model: nn.Module, text: TokenizedDocuments) -> Tensor:
    """(T - 1,) float64 log p of every target of a text."""
    p = lab.preset
    windows = {"block_size": p.block_size, "stride": p.stride, "batch_size": p.batch_size}
    return run_model(lab, model.eval(), text, "ffn", windows)[2].double()


def evaluated(lab: Lab) -> list[int | None]:
    """What decides the tokens that are scored and how they are read, for cache keys."""
    p = lab.preset
    windows = [p.block_size, p.stride] if p.block_size or p.stride else []
    return [p.valid_tokens, p.test_tokens, p.document_tokens, *windows]


def stream(text: TokenizedDocuments) -> Tensor:
    """(T,) tokens of a text."""
    return torch.from_numpy(np.asarray(text.tokens))


def block_size_of(lab: Lab, model: Any) -> int:
    """Tokens of one training block: the preset's, or what the model was made for."""
    from knnext.lm.hidden_states import default_block_size

    return lab.preset.block_size or default_block_size(model)
