"""Is the datastore only a memory, such as an LM that knows its training text by heart would be?

The base LM is trained further on a part of its text, dropout off, until it has learned that part
by heart, and each epoch's checkpoint is mixed with the base LM. Beside it: datastores of the very
same tokens, of all rows, and of the memorizing LM's own states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from knnext.experiments.lab import EVALUATED, Lab, figures, lm_training
from knnext.experiments.lab.claims import no_gain
from knnext.experiments.lab.contrast import Fitted, Gain, advantage, fit_component
from knnext.experiments.lab.correlation import Correlation, pearson, spearman
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.memorizing import (
    NLL_TOKENS,
    Checkpoint,
    load_checkpoints,
    memorize,
    memorized_lm,
)
from knnext.experiments.lab.mixture import DEFAULT_TEMPERATURES, LogP, by_name
from knnext.experiments.lab.results import Agreement, Description, Findings, PaperFigure

DESCRIPTION = Description(
    name="memorization",
    title="Memorization",
    question="Does an LM that has memorized the training text help as the datastore does?",
    claim="No: mixed with the base LM, an overfitted LM gives no improvement at any epoch, so "
    "what the datastore adds is not memory alone.",
    varies="the second component: an overfitted copy of the LM in place of W_ds; whose states",
    paper=(
        PaperFigure("no improvement by mixing, over some 233 epochs", "digest"),
        PaperFigure("learning rate 1e-2 (NAG), all dropout 0, clipping at 100", "code"),
    ),
)

_EPOCHS = (1, 2, 5, 10, 15, 20, 30, 40)
_TOKENS, _BATCH, _RATE = 50_000, 4, 1e-3
_TEMPERATURES = DEFAULT_TEMPERATURES[6:28:2]
_KNN = Setting()


def run(lab: Lab) -> Findings:
    """Memorize, mix every checkpoint, compare with the datastores."""
    base = lab.lm()
    part = part_lab(lab)
    settings = _settings(lab, part)
    folder = lab.cache.get("memorized", settings, lambda f: memorize(lab, part, settings, f))
    checkpoints = load_checkpoints(folder, settings["epochs"])
    knn = {
        "datastore of the same tokens": part.component(_KNN),
        "datastore of all rows": lab.component(_KNN),
        "datastore of all rows, memorizing LM's states": lab.component(
            _KNN, lm=memorized_lm(folder, base, settings)
        ),
    }
    unigram = by_name(lab.splits(), {s: _unigram(lab, s) for s in EVALUATED})
    return Analysis(lab).findings(checkpoints, knn, unigram, part)


def part_lab(lab: Lab) -> Lab:
    """The same lab with a datastore of the memorized tokens alone."""
    tokens = lab.preset.option("memorization.tokens", min(_TOKENS, lab.preset.entries // 8))
    preset = replace(lab.preset, entries=tokens)
    return Lab(preset, lab.folder, lab.say, lab.device)


def _settings(lab: Lab, part: Lab) -> dict[str, Any]:
    option = lab.preset.option
    return {
        "lm": lab.lm().settings,
        "tokens": part.preset.entries,
        "epochs": list(option("memorization.epochs", _EPOCHS)),
        "batch_size": option("memorization.batch_size", _BATCH),
        "learning_rate": option("memorization.learning_rate", _RATE),
        "seed": option("memorization.seed", 0),
        "evaluated": lm_training.evaluated(lab),
    }


def _unigram(lab: Lab, split: str) -> Tensor:
    """(n,) log p of the targets by their counts in the training text, one added to each."""
    vocab_size = lab.padding_token
    counts = lm_training.stream(lab.text("train")).long().bincount(minlength=vocab_size) + 1.0
    return (counts / counts.sum()).double().log()[lab.split(split).targets]


class Analysis:
    """Mixtures and correlations of checkpoints and datastores with one base LM."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.resamples = lab, lab.preset.resamples
        self.valid, self.test = lab.splits()
        self.reference = torch.empty(0, dtype=torch.float32, device="cpu")

    def findings(
        self,
        checkpoints: Sequence[Checkpoint],
        knn: Mapping[str, LogP],
        unigram: LogP,
        part: Lab,
    ) -> Findings:
        """The table: every epoch, the datastores, and a unigram LM as a control."""
        stores = {name: self.fit(one, _TEMPERATURES) for name, one in knn.items()}
        whole = knn["datastore of all rows"]
        best_t = stores["datastore of all rows"].mixture.temperature
        self.reference = whole("test", best_t).exp() - self.test.log_p_lm.exp()
        rows, fits = [], []
        for one in checkpoints:
            component = by_name((self.valid, self.test), one.log_p)
            fits.append(self.fit(component, (1.0,)))
            rows.append(
                self.row("memorizing LM", fits[-1], one.log_p["test"], one.epoch, one.train_nll)
            )
        for name, fitted in stores.items():
            log_p = knn[name]("test", fitted.mixture.temperature)
            rows.append(self.row(name, fitted, log_p))
        rows.append(self.row("unigram LM", self.fit(unigram, (1.0,)), unigram("test", 1.0)))
        chosen = min(range(len(fits)), key=lambda i: fits[i].valid_nll)
        same = stores["datastore of the same tokens"]
        tokens = len(part.text("store").tokens)
        return self._conclude(rows, checkpoints, fits, chosen, same, tokens)

    def fit(self, component: LogP, temperatures: Sequence[float]) -> Fitted:
        """Fitted on valid, measured on test."""
        return fit_component(
            self.valid, self.test, component, temperatures, resamples=self.resamples
        )

    def row(
        self,
        name: str,
        fitted: Fitted,
        log_p: Tensor,
        epoch: int | None = None,
        train_nll: float | None = None,
    ) -> dict[str, Any]:
        """One component's row of the table."""
        m = fitted.mixture
        linear, ranked = self.correlations(log_p)
        return {
            "component": name,
            "epoch": epoch,
            "train nll": train_nll,
            "alone": m.alone,
            "lmbda": m.lmbda,
            "perplexity": m.mixture,
            "change": str(Gain(m.gain, m.interval)),
            "paper's way": m.paper["mixture"],
            "Pearson": str(linear),
            "Spearman": str(ranked),
        }

    def correlations(self, log_p: Tensor) -> tuple[Correlation, Correlation]:
        """Of p - p_lm with the datastore's, over the targets of test."""
        difference, ids = log_p.exp() - self.test.log_p_lm.exp(), self.test.document_ids
        return (
            pearson(difference, self.reference, ids, resamples=self.resamples),
            spearman(difference, self.reference, ids, resamples=self.resamples),
        )

    def _conclude(
        self,
        rows: list[dict[str, Any]],
        checkpoints: Sequence[Checkpoint],
        fits: Sequence[Fitted],
        chosen: int,
        same: Fitted,
        tokens: int,
    ) -> Findings:
        best, last = fits[chosen], checkpoints[-1]
        gain = advantage(self.test, best.log_p, self.test.log_p_lm, self.resamples)
        datastore = advantage(self.test, same.log_p, self.test.log_p_lm, self.resamples)
        lead = advantage(self.test, same.log_p, best.log_p, self.resamples)
        final = self.correlations(last.log_p["test"])[0]
        words = (
            f"Trained on {tokens:,} tokens for {last.epoch} epochs, to {last.train_nll:.2f} nats "
            f"on the first {min(tokens, NLL_TOKENS):,} of them, the LM changes the "
            f"mixture's perplexity by {gain} at its best epoch "
            f"({checkpoints[chosen].epoch}, chosen on valid); a datastore of the same tokens by "
            f"{datastore}. Its help correlates with the whole datastore's by {final} at the end."
        )
        series = {
            "epochs": [one.epoch for one in checkpoints],
            "train nll": [one.train_nll for one in checkpoints],
            "alone": [fit.mixture.alone for fit in fits],
            "mixture": [fit.mixture.mixture for fit in fits],
            "base": best.mixture.base,
            "datastore of the same tokens": same.mixture.mixture,
            "tokens": tokens,
        }
        details = {
            "setting of the datastores": _KNN.to_dict(),
            "seeds": "one: it decides the order of the blocks only, the weights are the base LM's",
            "gain": gain.to_dict(),
            "lead of the datastore of the same tokens": lead.to_dict(),
            "unigram LM": "p - p_lm of any component holds -p_lm, which alone correlates",
        }
        return Findings(rows, agreement(gain, lead), words, str(gain), series, details)


def agreement(gain: Gain, lead: Gain) -> Agreement:
    """No gain agrees; a gain below that of a datastore of the same tokens agrees in part."""
    found = no_gain(gain.interval)
    if found != "disagrees":
        return found
    return "agrees in part" if lead.interval.low > 0 else "disagrees"


def plot(result: dict[str, Any], axes: Any) -> None:
    """By epoch: the mixture on test above; below the memorizing LM, on test and on its own text."""
    s, figure = result["series"], axes.figure
    axes.remove()
    figure.set_size_inches(7.2, 6.4)
    mixed, alone = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
    figures.line(mixed, s["epochs"], s["mixture"], "mixed with the base LM", 4)
    figures.reference_line(mixed, s["base"], "the base LM alone")
    store = s["datastore of the same tokens"]
    label = "with a datastore of the same tokens"
    color = figures.look("exact", "real")["color"]
    mixed.axhline(store, color=color, ls=":", lw=1.8, label=label)
    figures.dress(
        mixed,
        title=f"An LM that memorizes {s['tokens']:,} tokens",
        xlabel="",
        ylabel="perplexity per token (test)",
        legend=False,
    )
    own = [math.exp(nll) for nll in s["train nll"]]
    figures.line(alone, s["epochs"], s["alone"], "on test", 4)
    hollow = {"linestyle": ":", "markerfacecolor": "white"}
    figures.line(alone, s["epochs"], own, "on the text it memorizes", 4, **hollow)
    alone.set_yscale("log")
    figures.plain_ticks(alone.yaxis)
    figures.dress(
        alone,
        title="The memorizing LM alone",
        xlabel="epochs of training on these tokens",
        ylabel="perplexity, log scale",
        legend=False,
    )
    for panel in (mixed, alone):
        # Between title and curves, where it covers neither.
        panel.set_title(panel.get_title(loc="left"), loc="left", pad=18, fontsize=11)
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.0}
        panel.legend(frameon=False, fontsize=8, labelcolor=figures.INK, ncols=3, **place)
    change = result["headline"].replace("-", "−")
    figures.note(figure, f"The mixture's change at the best epoch on validation: {change}.")
