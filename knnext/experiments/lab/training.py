"""Training a replacement of the datastore on the datastore's own rows.

The states are those that the frozen LM, with dropout off, wrote into the datastore, and the targets
are its values. (The authors froze the LM's weights but left its dropout on.) What is trained is a
`Component`: a small module that gives every target a probability from the states alone.

The loop is the plain one: AdamW, warm-up, a cosine to zero, no decay of weights unless asked for.
The valid loss is measured on the way, and the weights with the lowest one are kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from knnext.experiments.lab import EVALUATED, LM, Lab
from knnext.experiments.lab.examples import EVALUATION_ROWS, Examples
from knnext.experiments.lab.mixture import LogP
from knnext.output import write_json

#: Log p of the targets (n,) under a module, from the states and the targets.
Component = nn.Module
#: The scalar to minimize, from (n,) log p of the targets and their examples.
Loss = Callable[[Tensor, Examples], Tensor]


def nll(log_p: Tensor, _examples: Examples) -> Tensor:
    """Mean cross-entropy, nats."""
    return -log_p.mean()


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; the peak rate is reached after a share `warmup` of the steps.

    `checks`: how often the valid loss is measured, evenly spaced, the last at the end.
    """

    steps: int
    batch_size: int = 512
    learning_rate: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    checks: int = 8

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.checks < 1:
            raise ValueError(f"steps, batch_size and checks must be positive, got {self}")

    def rate(self, step: int) -> float:
        """The share of the peak rate at a step, from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))

    def is_check(self, step: int) -> bool:
        """Whether the valid loss is due after so many steps."""
        return step * self.checks // self.steps > (step - 1) * self.checks // self.steps


@dataclass(frozen=True)
class Trained:
    """A trained component of one seed.

    Attributes:
        log_p: (n,) float64 log p of the targets of `"valid"` and `"test"`.
        parameters: what was trained, float32, by name.
        history: `step`, `train` (mean loss since the last check), `valid`, one entry a check.
        seconds: of its training.
    """

    log_p: dict[str, Tensor]
    parameters: dict[str, Tensor]
    history: list[dict[str, float]]
    seconds: float

    @property
    def component(self) -> LogP:
        """For `mixture.mix`; it has no temperature, its scale is learned."""
        return lambda name, _temperature: self.log_p[name]

    @property
    def converged(self) -> bool:
        """Whether the second half of the training lowered the valid loss by under 0.02 nats.

        A half and not the last few steps: where the rate has come down the loss is flat at any
        length of training.
        """
        late = [h["valid"] for h in self.history[-(len(self.history) // 2 + 1) :]]
        return len(late) > 1 and late[0] - min(late) < 0.02


def trained(
    lab: Lab,
    name: str,
    settings: Mapping[str, Any],
    build: Callable[[torch.Generator], Component],
    examples: Callable[[str], Examples],
    schedule: Schedule,
    *,
    seed: int = 0,
    loss: Loss = nll,
    lm: LM | None = None,
) -> Trained:
    """A component trained on the lab's datastore; made once for its settings and kept.

    Args:
        name: of the component, for people; part of the key.
        settings: plain values that decide component, examples and loss.
        build: the untrained component, from a seeded generator on the CPU.
        examples: those of `"train"`, `"valid"` or `"test"`; asked for only where it is trained.
        schedule, seed: of the training; the seed also decides the order of the rows.
        loss: see `Loss`.
        lm: whose states; by default the LM of seed 0.
    """
    lm = lm or lab.lm()
    key = {
        "component": name,
        **settings,
        "schedule": asdict(schedule),
        "seed": seed,
        "store": lab.store("att", lm=lm).fingerprint,
        "evaluated": [lab.preset.valid_tokens, lab.preset.test_tokens, lab.preset.document_tokens],
    }

    def make(folder: Path) -> None:
        with lab.step(f"train {name}, seed {seed}, for {schedule.steps:,} steps"):
            start = time.perf_counter()
            component = build(torch.Generator().manual_seed(seed)).to(lab.device)
            history = train(
                component, examples("train"), examples("valid"), schedule, seed=seed, loss=loss
            )
            found = {s: log_p(component, examples(s)).numpy() for s in EVALUATED}
            weights = {n: p.numpy(force=True) for n, p in _trainable(component).items()}
            np.savez(folder / "log_p.npz", allow_pickle=False, **found)
            np.savez(folder / "parameters.npz", allow_pickle=False, **weights)
            seconds = time.perf_counter() - start
            write_json(folder / "history.json", {"history": history, "seconds": seconds})

    return _load(lab.cache.get("trained", key, make))


def _load(folder: Path) -> Trained:
    arrays = []
    for name in ("log_p.npz", "parameters.npz"):
        with np.load(folder / name, allow_pickle=False) as archive:
            arrays.append({n: torch.from_numpy(archive[n]) for n in archive.files})
    record = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return Trained(arrays[0], arrays[1], record["history"], record["seconds"])


def train(
    component: Component,
    examples: Examples,
    valid: Examples,
    schedule: Schedule,
    *,
    seed: int = 0,
    loss: Loss = nll,
) -> list[dict[str, float]]:
    """Train in place, leave the weights with the lowest valid loss, return the history."""
    parameters = _trainable(component)
    device = next(iter(parameters.values())).device
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        parameters.values(), weight_decay=schedule.weight_decay, betas=(0.9, 0.99), fused=fused
    )
    batches = _batches(len(examples), schedule.batch_size, seed)
    history: list[dict[str, float]] = []
    best, kept, since = math.inf, {}, torch.zeros(2, dtype=torch.float64, device=device)
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.rate(step)
        batch = examples.at(next(batches), device)
        with _fast_products():
            value = loss(component.train()(batch.states, batch.targets), batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
        optimizer.step()
        since += torch.stack([value.detach().double(), torch.ones_like(since[0])])
        if not schedule.is_check(step + 1):
            continue
        beside = replace(valid, states=()).at(slice(None), device)
        measured = float(loss(log_p(component, valid, device), beside))
        history.append({"step": step + 1, "train": float(since[0] / since[1]), "valid": measured})
        since.zero_()
        if measured < best:
            best, kept = measured, {n: p.detach().clone() for n, p in parameters.items()}
    with torch.no_grad():
        for name, weights in kept.items():
            parameters[name].copy_(weights)
    return history


def log_p(component: Component, examples: Examples, to: str | torch.device = "cpu") -> Tensor:
    """(n,) float64 log p of every target, in blocks."""
    device = next(component.parameters()).device
    parts = []
    with torch.no_grad():
        component.eval()
        for begin in range(0, len(examples), EVALUATION_ROWS):
            block = examples.at(slice(begin, begin + EVALUATION_ROWS), device)
            parts.append(component(block.states, block.targets).double().to(to))
    return torch.cat(parts)


@contextmanager
def _fast_products() -> Iterator[None]:
    """Lets float32 products run in tensor cores, or in oneDNN: twice as fast on some CPUs.

    For gradients alone: what is measured is measured in float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _trainable(component: Component) -> dict[str, nn.Parameter]:
    return {n: p for n, p in component.named_parameters() if p.requires_grad}


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers (size,) int64, each row once a pass; ascending, as files like to be read."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64, device="cpu")
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator, device="cpu")])
        yield order[:size].sort().values
        order = order[size:]
