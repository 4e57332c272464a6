"""Does the kNN-LM help because one-hot targets over-correct, and softer ones would not?

Students of the base LM's shape are trained from scratch: on hard labels (the control), on the base
LM's distribution, and on the kNN-LM's, in which a row of the training text does not find itself.
All see the same blocks in the same number of steps, and each is mixed with the base LM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from knnext.experiments.lab import EVALUATED, Lab, figures, lm_training
from knnext.experiments.lab.claims import no_gain
from knnext.experiments.lab.contrast import Fitted, Gain, advantage, fit_component
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.leave_one_out import row_neighbors
from knnext.experiments.lab.lm_training import BlockLoss, BlockSchedule
from knnext.experiments.lab.mixture import DEFAULT_TEMPERATURES, by_name, seed_interval
from knnext.experiments.lab.results import Agreement, Description, Findings, PaperFigure
from knnext.ops import knn_interpolate
from knnext.output import write_json

DESCRIPTION = Description(
    name="soft-labels",
    title="Soft labels",
    question="Does a fresh LM trained on soft labels help the base LM as the datastore does?",
    claim="No: an LM of the same shape trained on the base LM's soft labels does not help.",
    varies="the second component: a student LM in place of W_ds, by the labels it was trained on",
    paper=(PaperFigure("no help from soft labels of the base LM", "digest"),),
)

HARD, BASE, KNN = "hard labels", "the base LM's labels", "the kNN-LM's labels"
_TEACHER = "kNN-LM (the teacher)"
_SETTING = Setting(mask="faiss", score="real")
_STEP_FACTOR, _BLOCKS, _NEIGHBORS = 1.25, 1500, 128
_TEMPERATURES = DEFAULT_TEMPERATURES[6:28:2]
_BEHIND = 0.1  # nats a token by which a student may be a worse LM than the base and still tell
_FIRST_SEED = 1000  # a student that starts where the base LM started would be half a copy of it


@dataclass(frozen=True)
class Teacher:
    """The kNN-LM whose distribution is learned: its fit on valid, and what k it uses."""

    fitted: Fitted
    k: int


def run(lab: Lab) -> Findings:
    """Train the students, mix each with the base LM, compare them with the control."""
    teacher = _teacher(lab)
    schedule, starts = _plan(lab)
    students: dict[str, list[dict[str, Tensor]]] = {
        labels: [
            _student(lab, labels, seed, schedule, starts, teacher) for seed in lab.preset.seeds
        ]
        for labels in (HARD, BASE, KNN)
    }
    return findings(lab, students, teacher, schedule, len(starts))


def _teacher(lab: Lab) -> Teacher:
    k = min(lab.preset.option("soft-labels.k", _NEIGHBORS), lab.preset.k)
    found = {split: lab.neighbors(_SETTING, split).truncate(k) for split in EVALUATED}
    valid, test = lab.splits()
    fitted = fit_component(
        valid,
        test,
        lambda split, temperature: found[split].log_p_knn(temperature),
        _TEMPERATURES,
        resamples=lab.preset.resamples,
    )
    return Teacher(fitted, k)


def _plan(lab: Lab) -> tuple[BlockSchedule, Tensor]:
    """The schedule of every student, and the starts of the blocks that they see."""
    train, option = lab.preset.train, lab.preset.option
    block = lm_training.block_size_of(lab, lab.lm().model)
    schedule = BlockSchedule(
        steps=round(lab.preset.steps * option("soft-labels.steps", _STEP_FACTOR)),
        block_size=block,
        batch_size=option("soft-labels.batch_size", train.batch_size),
        learning_rate=train.learning_rate,
        warmup=train.warmup,
        min_rate=train.min_rate,
        weight_decay=train.weight_decay,
    )
    starts = torch.arange(0, len(lab.text("store").tokens) - block, block, device="cpu")
    wanted = min(schedule.steps * schedule.batch_size, option("soft-labels.blocks", _BLOCKS))
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(0), device="cpu")
    return schedule, starts[order[:wanted]].sort().values


def _student(
    lab: Lab, labels: str, seed: int, schedule: BlockSchedule, starts: Tensor, teacher: Teacher
) -> dict[str, Tensor]:
    """Log p of both splits under one student."""
    settings = {
        "lm": lab.lm().settings,
        "labels": labels,
        "schedule": asdict(schedule),
        "blocks": len(starts),
        "seed": seed,
        "text": lab.store("att").fingerprint,
        "teacher": _teacher_settings(lab, teacher) if labels == KNN else {},
        "evaluated": lm_training.evaluated(lab),
    }

    def make(folder: Path) -> None:
        loss = label_loss(lab, labels, starts, schedule.block_size, teacher)
        with lab.step(f"train a student on {labels}, seed {seed}, for {schedule.steps} steps"):
            model = _new_student(lab, seed)
            tokens = lm_training.stream(lab.text("store"))
            order = _orders(starts, seed)
            losses = lm_training.train_blocks(model, tokens, order, schedule, loss)
            log_p = {n: one.numpy() for n, one in lm_training.score_splits(lab, model).items()}
        np.savez(folder / "log_p.npz", allow_pickle=False, **log_p)
        write_json(folder / "training.json", {"losses": losses})

    with np.load(lab.cache.get("student", settings, make) / "log_p.npz") as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def _teacher_settings(lab: Lab, teacher: Teacher) -> dict[str, Any]:
    m = teacher.fitted.mixture
    index = [lab.preset.nprobe, lab.preset.factory, lab.preset.train_size]
    return {"k": teacher.k, "temperature": m.temperature, "lmbda": m.lmbda, "index": index}


def _orders(starts: Tensor, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield starts[torch.randperm(len(starts), generator=generator, device="cpu")]


def _new_student(lab: Lab, seed: int) -> nn.Module:
    """An untrained model of the base LM's configuration."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(_FIRST_SEED + seed)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            lab.lm().model.config, trust_remote_code=False
        )
    return model.to(lab.device)


def label_loss(
    lab: Lab, labels: str, starts: Tensor, block_size: int, teacher: Teacher
) -> BlockLoss:
    """Cross-entropy with the labels at each position of the datastore's text.

    Soft labels come from the rows of the datastore, whose states have seen their whole window, and
    not from the block that the student sees.
    """
    tokens = lm_training.stream(lab.text("store"))
    if labels == HARD:
        return lm_training.next_token_loss(tokens)
    weight = lab.lm().output_embedding.to(lab.device)
    bias = lab.lm().output_bias
    bias = None if bias is None else bias.to(lab.device)
    keys = lab.train_states("ffn").keys
    positions = (starts[:, None] + torch.arange(block_size, device="cpu")).flatten()
    place = torch.full((len(tokens),), -1, dtype=torch.int64, device="cpu")
    place[positions] = torch.arange(len(positions), device="cpu")
    near = None if labels == BASE else row_neighbors(lab, positions, teacher.k, _SETTING)
    m = teacher.fitted.mixture

    def loss(logits: Tensor, at: Tensor) -> Tensor:
        teaching = keys[at].to(weight.device).float() @ weight.T
        teaching = teaching if bias is None else teaching + bias
        if near is None:
            log_q = teaching.log_softmax(1)
        else:
            rows = place[at]
            distances = near.distances[rows].to(weight.device)
            tokens_near = near.tokens[rows].to(weight.device)
            log_q = knn_interpolate(teaching, distances, tokens_near, m.temperature, m.lmbda)
        return nn.functional.cross_entropy(logits.float(), log_q.exp())

    return loss


def findings(
    lab: Lab,
    students: Mapping[str, list[dict[str, Tensor]]],
    teacher: Teacher,
    schedule: BlockSchedule,
    blocks: int,
) -> Findings:
    """The table: students by their labels, over seeds, and the teacher."""
    valid, test = lab.splits()
    resamples = lab.preset.resamples
    fits = {
        labels: [
            fit_component(valid, test, by_name((valid, test), one), (1.0,), resamples=resamples)
            for one in runs
        ]
        for labels, runs in students.items()
    }
    # Over seeds the log-probabilities are averaged: the mean of the gains, with one interval.
    mean = {labels: torch.stack([f.log_p for f in runs]).mean(0) for labels, runs in fits.items()}
    gains = {n: advantage(test, one, test.log_p_lm, resamples) for n, one in mean.items()}
    leads = {n: advantage(test, one, mean[HARD], resamples) for n, one in mean.items()}
    rows = [_row(n, runs, gains[n], leads[n] if n != HARD else None) for n, runs in fits.items()]
    knn = teacher.fitted
    knn_gain = advantage(test, knn.log_p, test.log_p_lm, resamples)
    rows.append(_row(_TEACHER, [knn], knn_gain, advantage(test, knn.log_p, mean[HARD], resamples)))
    tokens = schedule.steps * schedule.batch_size * schedule.block_size
    words = (
        f"Mixed with the base LM, a student on its labels changes perplexity by {gains[BASE]}, one "
        f"on the kNN-LM's labels by {gains[KNN]} and one on hard labels by {gains[HARD]} (mean of "
        f"{len(lab.preset.seeds)} seeds); the kNN-LM itself by {knn_gain}. The students saw "
        f"{tokens:,} tokens each: alone, in this order, they have {_alone(rows)}, the base LM "
        f"{knn.mixture.base:.0f}."
    )
    series = {
        "labels": [*fits, _TEACHER],
        "gains": [g.to_dict() for g in (*gains.values(), knn_gain)],
        "runs": [[f.mixture.gain for f in runs] for runs in (*fits.values(), [knn])],
    }
    details = {
        "setting of the teacher": _SETTING.to_dict(),
        "teacher": {"k": teacher.k, "temperature": knn.mixture.temperature}
        | {"lmbda": knn.mixture.lmbda},
        "schedule": asdict(schedule),
        "blocks": blocks,
        "against hard labels": {n: leads[n].to_dict() for n in (BASE, KNN)},
    }
    alone = torch.stack([run[test.name].mean() for run in students[BASE]])
    behind = float(test.log_p_lm.mean() - alone.mean())
    verdict = agreement(gains[BASE], leads[BASE], behind)
    if behind > _BEHIND and verdict == "undecided":
        words += (
            " A student so much weaker than the base LM could hardly help it, whatever its labels: "
            "this decides little."
        )
    details["behind the base LM, nats"] = behind
    return Findings(rows, verdict, words, str(gains[BASE]), series, details)


def _alone(rows: list[dict[str, Any]]) -> str:
    """Perplexities of the students, in the order in which the words name them."""
    by_name = {row["second component"]: row["alone"] for row in rows}
    found = [by_name[labels] for labels in (BASE, KNN, HARD)]
    return ", ".join("none" if one is None else f"{one:.0f}" for one in found)


def _row(name: str, runs: list[Fitted], gain: Gain, lead: Gain | None) -> dict[str, Any]:
    mixed = seed_interval([f.mixture.mixture for f in runs])
    alone = [f.mixture.alone for f in runs if f.mixture.alone is not None]
    return {
        "second component": name,
        "runs": len(runs),
        "alone": seed_interval(alone)["mean"] if len(alone) == len(runs) else None,
        "lmbda": seed_interval([f.mixture.lmbda for f in runs])["mean"],
        "perplexity": mixed["mean"],
        "std over seeds": mixed["std"] if len(runs) > 1 else None,
        "change": str(gain),
        "paper's way": seed_interval([f.mixture.paper["mixture"] for f in runs])["mean"],
        "against hard labels": "" if lead is None else str(lead),
    }


def agreement(gain: Gain, lead: Gain, behind: float) -> Agreement:
    """No gain agrees; a gain, but none above hard labels', agrees in part: any LM gives that.

    `behind`: by how many nats a token the student alone is worse than the base LM. Where that is
    much, no gain says nothing of its labels.
    """
    found = no_gain(gain.interval)
    if found != "disagrees":
        return "undecided" if behind > _BEHIND else found
    return "disagrees" if lead.interval.low > 0 else "agrees in part"


def plot(result: dict[str, Any], axes: Any) -> None:
    """The change of perplexity by each student's mixture, runs as dots."""
    s = result["series"]
    gains = s["gains"]
    axes.figure.set_size_inches(8.2, 3.8)

    def change(gain: float | None) -> float | None:
        return None if gain is None else figures.percent_change(gain)

    figures.bars(
        axes,
        s["labels"],
        [change(g["value"]) for g in gains],
        [(change(g["low"]), change(g["high"])) for g in gains],
        standard=s["labels"][-1],
    )
    for place, runs in enumerate(reversed(s["runs"])):
        dots = {"color": figures.COLORS[1], "ms": 4, "mfc": "white"}
        axes.plot([change(g) for g in runs], [place - 0.2] * len(runs), "o", **dots)
    figures.dress(
        axes,
        title="Students mixed with the base LM, by the labels they learned",
        xlabel=f"{figures.CHANGE_LABEL} (dots: single runs)",
        ylabel="",
    )
