"""Training an LM until it knows a text by heart, and what its checkpoints give to other text."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnext.experiments.lab import LM, Lab, lm_training
from knnext.output import whole_file, write_json

NLL_TOKENS = 10_000  # of the memorized text, on which its loss is measured


@dataclass(frozen=True)
class Checkpoint:
    """One epoch: `train_nll` in nats per token of the memorized text, log p of both splits."""

    epoch: int
    train_nll: float
    log_p: dict[str, Tensor]


def memorize(lab: Lab, part: Lab, settings: Mapping[str, Any], folder: Path) -> None:
    """Train a copy of the LM; each epoch that is asked for leaves its figures and its weights, so
    that an interrupted training goes on from there."""
    model = copy.deepcopy(lab.lm().model).eval()  # eval: every dropout is off
    tokens = lm_training.stream(part.text("store"))
    block = lm_training.block_size_of(lab, model)
    generator = torch.Generator().manual_seed(settings["seed"])
    optimizer = lm_training.new_optimizer(model, settings["learning_rate"], 0.0)
    done = _resume(folder, model, optimizer, generator)
    epochs = settings["epochs"]
    with lab.step(f"memorize {len(tokens):,} tokens for {epochs[-1] - done} epochs"):
        for epoch in range(done + 1, epochs[-1] + 1):
            starts = next(lm_training.passes(len(tokens), block, generator))
            loss = lm_training.next_token_loss(tokens)
            for chosen in starts.split(settings["batch_size"]):
                lm_training.step(model, optimizer, tokens, chosen, block, loss)
            if epoch in epochs:
                _save(lab, part, model, folder, epoch)
                state = (model.state_dict(), optimizer.state_dict(), generator.get_state(), epoch)
                with whole_file(folder / "state.pt") as fresh:
                    torch.save(state, fresh)


def _resume(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> int:
    """Epochs that an earlier attempt finished, its state loaded."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    weights, moments, random, epoch = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    generator.set_state(random)
    return int(epoch)


def _save(lab: Lab, part: Lab, model: Any, folder: Path, epoch: int) -> None:
    log_p = {n: one.numpy() for n, one in lm_training.score_splits(lab, model).items()}
    text = part.text("store")
    head = replace(text, tokens=text.tokens[: NLL_TOKENS + 1])
    nll = -float(lm_training.score_text(lab, model, head).mean())
    np.savez(folder / f"epoch-{epoch}.npz", allow_pickle=False, **log_p)
    write_json(folder / f"epoch-{epoch}.json", {"train_nll": nll})


def load_checkpoints(folder: Path, epochs: Sequence[int]) -> list[Checkpoint]:
    """What `memorize` left of some epochs."""
    found = []
    for epoch in epochs:
        with np.load(folder / f"epoch-{epoch}.npz", allow_pickle=False) as archive:
            log_p = {name: torch.from_numpy(archive[name]) for name in archive.files}
        record = json.loads((folder / f"epoch-{epoch}.json").read_text(encoding="utf-8"))
        found.append(Checkpoint(epoch, record["train_nll"], log_p))
    return found


def memorized_lm(folder: Path, base: LM, settings: dict[str, Any]) -> LM:
    """The LM of the last epoch."""
    model = copy.deepcopy(base.model)
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state[0])
    return LM(model.eval(), base.tokenizer, {"memorized": settings}, settings["seed"])
