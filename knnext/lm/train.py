"""Trains the demo's language model: a byte-level BPE tokenizer and a small GPT-2, within minutes.

The loop is the plain one: AdamW, warm-up, a cosine to a tenth of the peak, clipping at 1. The
schedule runs over the time budget and not over steps, so the rate has always come down when time
is up, on any machine. With ``max_steps`` it runs over steps, and the same seed, threads and device
then give the same model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from knnext.corpus import Document
from knnext.devices import checked_device
from knnext.lm.load import libraries
from knnext.progress import Progress

SEPARATOR = "<|endoftext|>"
_TOKENIZER_BYTES = 8 << 20


@dataclass(frozen=True)
class TrainConfig:
    """Shape of the model and of its training; the defaults suit two CPU cores and two minutes.

    ``block_size`` is the context in tokens, and ``batch_size`` sequences of it make a step.
    ``learning_rate`` is the peak; ``min_rate`` is the share of it that is left at the end.
    """

    vocab_size: int = 4096
    num_layers: int = 3
    dim: int = 128
    num_heads: int = 4
    block_size: int = 128
    batch_size: int = 4
    learning_rate: float = 2e-3
    min_rate: float = 0.1
    warmup: float = 0.1
    weight_decay: float = 0.1
    dropout: float = 0.0
    seed: int = 0


@dataclass
class TrainResult:
    """The trained model, and what its training was.

    ``losses``: mean nll per token of each step. ``tokens`` were seen in ``seconds``.
    """

    model: Any
    steps: int
    tokens: int
    seconds: float
    losses: list[float] = field(repr=False, default_factory=list)


def train_tokenizer(documents: Sequence[Document], vocab_size: int = 4096) -> Any:
    """A byte-level BPE tokenizer of exactly ``vocab_size`` ids where the text allows it.

    Any text can be written with it. One special token, ``<|endoftext|>``, is bos, eos and padding.
    It learns from the first 8 MB.
    """
    tokenizers, transformers = libraries()
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (bytes and a mark), got {vocab_size}")
    bpe = tokenizers.ByteLevelBPETokenizer()
    texts = _head(documents, _TOKENIZER_BYTES)
    bpe.train_from_iterator(
        texts, vocab_size, min_frequency=2, show_progress=False, special_tokens=[SEPARATOR]
    )
    marks = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SEPARATOR)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **marks)


def _head(documents: Sequence[Document], limit: int) -> Iterator[str]:
    used = 0
    for document in documents:
        if used >= limit:
            return
        yield document.text
        used += document.num_bytes


def new_model(config: TrainConfig, tokenizer: Any) -> Any:
    """An untrained GPT2LMHeadModel of the configured shape, with tied embeddings."""
    _, transformers = libraries()
    torch.manual_seed(config.seed)
    separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.block_size,
            n_embd=config.dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=separator,
            eos_token_id=separator,
            use_cache=False,
        )
    )
    # Not in the config: there it makes every forward pass warn that padding may be unmasked.
    model.generation_config.pad_token_id = separator
    return model


def train_lm(
    tokens: np.ndarray,
    tokenizer: Any,
    config: TrainConfig | None = None,
    *,
    seconds: float = 120.0,
    max_steps: int | None = None,
    device: str | torch.device | None = None,
) -> TrainResult:
    """Trains for ``seconds`` of wall time (or ``max_steps``) on one token stream (T,).

    ``device`` defaults to a GPU where there is one; there the matrices run in bfloat16. The model
    comes back in float32, in eval mode, on the CPU or that device. ValueError where the stream is
    shorter than one block, or the budget is not positive.
    """
    config = config if config is not None else TrainConfig()
    if len(tokens) <= config.block_size:
        raise ValueError(
            f"tokens must hold more than block_size={config.block_size} ids, got {len(tokens)}"
        )
    if seconds <= 0 or (max_steps is not None and max_steps < 1):
        raise ValueError(f"seconds and max_steps must be positive, got {seconds} and {max_steps}")
    place = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = new_model(config, tokenizer).to(place).train()
    losses, elapsed = _loop(model, tokens, config, place, seconds, max_steps)
    model.config.use_cache = True
    seen = len(losses) * config.batch_size * config.block_size
    return TrainResult(model.eval(), len(losses), seen, elapsed, losses)


def _loop(
    model: nn.Module,
    tokens: np.ndarray,
    config: TrainConfig,
    device: torch.device,
    seconds: float,
    max_steps: int | None,
) -> tuple[list[float], float]:
    optimizer = _optimizer(model, config)
    batches = _batches(torch.from_numpy(np.asarray(tokens)), config)
    losses: list[Tensor | float] = []
    unit, total = ("s", math.ceil(seconds)) if max_steps is None else ("step", max_steps)
    start = time.perf_counter()
    with Progress(total, "train the language model", unit) as bar:
        done = 0.0
        while done < 1.0:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate(done, config)
            loss = _step(model, optimizer, next(batches).to(device))
            # A GPU must not be waited for. On the CPU a tensor kept from each step would pin the
            # heap between the freed activations: two megabytes a step, gigabytes in minutes.
            losses.append(loss if loss.is_cuda else loss.item())
            elapsed = time.perf_counter() - start
            done = elapsed / seconds if max_steps is None else len(losses) / max_steps
            bar.update(min(int(done * total), total) - bar.done)
    return [float(loss) for loss in losses], time.perf_counter() - start


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, block: Tensor) -> Tensor:
    autocast = torch.autocast("cuda", torch.bfloat16) if block.is_cuda else nullcontext()
    with autocast:
        logits = model(input_ids=block[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), block[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def rate(done: float, config: TrainConfig) -> float:
    """The share of the peak learning rate after a share ``done`` of the budget."""
    if done < config.warmup:
        return (done + 0.1 * config.warmup) / (1.1 * config.warmup)
    along = min(1.0, (done - config.warmup) / (1.0 - config.warmup))
    return config.min_rate + (1.0 - config.min_rate) * 0.5 * (1.0 + math.cos(math.pi * along))


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def _batches(tokens: Tensor, config: TrainConfig) -> Iterator[Tensor]:
    """Blocks (batch, block + 1) int64; each pass cuts the stream elsewhere, in another order."""
    generator = torch.Generator().manual_seed(config.seed)
    block, size = config.block_size, len(tokens)
    order = torch.empty(0, dtype=torch.int64, device="cpu")
    while True:
        while len(order) < config.batch_size:
            shift = int(
                torch.randint(min(block, size - block), (1,), generator=generator, device="cpu")
            )
            starts = torch.arange(shift, size - block, block, device="cpu")
            more = starts[torch.randperm(len(starts), generator=generator, device="cpu")]
            order = torch.cat([order, more])
        chosen, order = order[: config.batch_size], order[config.batch_size :]
        yield tokens[chosen[:, None] + torch.arange(block + 1, device="cpu")].long()
