"""Rows to train a replacement of the datastore on: states, targets, and what the LM gave them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from knnext.experiments.lab import LM, Lab

#: Rows scored at once, where nothing is trained.
EVALUATION_ROWS = 4096


@dataclass(frozen=True)
class Examples:
    """Rows to train on or to score.

    `states`: (n, D) tensors, any float dtype, one for each that the component reads. `targets`
    (n,) int64. `extra`: (n,) tensors by name that a loss reads, such as the LM's log p.
    """

    states: tuple[Tensor, ...]
    targets: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.targets.shape[0]

    def at(self, rows: Tensor | slice, device: str | torch.device) -> Examples:
        """Some rows, states in float32, on a device."""
        return Examples(
            tuple(s[rows].to(device, non_blocking=True).float() for s in self.states),
            self.targets[rows].to(device),
            {name: one[rows].to(device) for name, one in self.extra.items()},
        )


def layer_examples(lab: Lab, *layers: str, lm: LM | None = None) -> Callable[[str], Examples]:
    """The states at one or more layers by split; `"train"` are the rows of the datastore."""

    def examples(split: str) -> Examples:
        found = [
            lab.train_states(layer, lm) if split == "train" else lab.states(split, layer, lm)
            for layer in layers
        ]
        for other in found[1:]:
            if not torch.equal(other.targets, found[0].targets):
                raise ValueError(f"the {split} states of {', '.join(layers)} are of other rows")
        return Examples(tuple(one.keys for one in found), found[0].targets)

    return examples


def train_log_p_lm(lab: Lab, lm: LM | None = None) -> Tensor:
    """(N,) float32 log p_lm of the datastore's own targets, from its ffn states; made once."""
    lm = lm or lab.lm()
    store = lab.store("ffn", lm=lm)

    def make(folder: Path) -> None:
        lab.check_output_layer(lm)
        weight, bias = lm.output_embedding.to(lab.device), lm.output_bias
        bias = None if bias is None else bias.to(lab.device)
        examples, parts = layer_examples(lab, "ffn", lm=lm)("train"), []
        with lab.step("score the datastore's rows with the LM"):
            for begin in range(0, len(examples), EVALUATION_ROWS):
                block = examples.at(slice(begin, begin + EVALUATION_ROWS), lab.device)
                logits = nn.functional.linear(block.states[0], weight, bias)
                loss = nn.functional.cross_entropy(logits, block.targets, reduction="none")
                parts.append(-loss.cpu())
        np.savez(folder / "log_p.npz", allow_pickle=False, log_p=torch.cat(parts).numpy())

    folder = lab.cache.get("train_log_p_lm", {"store": store.fingerprint}, make)
    with np.load(folder / "log_p.npz", allow_pickle=False) as archive:
        return torch.from_numpy(archive["log_p"])
