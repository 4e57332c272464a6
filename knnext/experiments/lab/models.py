"""The language models of the experiments and their states, made once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnext.evaluation.perplexity import TextCounts
from knnext.evaluation.scores import StreamScores
from knnext.experiments.lab import passes
from knnext.experiments.lab.cache import settings_key
from knnext.experiments.lab.mixture import Split
from knnext.experiments.lab.presets import Preset
from knnext.experiments.lab.texts import TextLab
from knnext.say import to_log

EVALUATED = ("valid", "test")
_LINEAR_TOLERANCE = 0.05  # nats; models in half precision differ by a hundredth


@dataclass(frozen=True)
class LM:
    """A language model and its tokenizer.

    `settings`: plain values that decide it, for cache keys. `seed`: of its training. `place`:
    arguments of `load_lm`, by which other processes have it too; None where it is in memory alone.
    """

    model: Any
    tokenizer: Any
    settings: dict[str, Any]
    seed: int
    place: dict[str, Any] | None = None

    @property
    def output_embedding(self) -> Tensor:
        """W_sm, (V, D) float32 on the CPU, without gradient."""
        return self.model.get_output_embeddings().weight.detach().float().cpu()

    @property
    def output_bias(self) -> Tensor | None:
        """(V,) float32 or None."""
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        return None if bias is None else bias.detach().float().cpu()


@dataclass(frozen=True)
class States:
    """The states of one split at one layer: `keys` (n, D) float32, `targets` (n,) int64.

    Row i stands at position i of the split's stream, and its target is the token that followed.
    """

    keys: Tensor
    targets: Tensor


class ModelLab(TextLab):
    """Adds the language models, their states and what they give the targets."""

    def __init__(
        self,
        preset: Preset,
        folder: str | Path,
        say: Callable[[str], None] = to_log,
        device: str | None = None,
    ) -> None:
        super().__init__(preset, folder, say, device)
        self._lms: dict[int, LM] = {}
        self._splits: dict[tuple[str, str], Split] = {}

    def lm(self, seed: int = 0) -> LM:
        """The language model; another seed gives another one of the same shape.

        ValueError where the preset names a finished model and a seed other than 0 is asked for.
        """
        if seed not in self._lms:
            self._lms[seed] = self._given_lm(seed) if self.preset.model else self._trained_lm(seed)
        return self._lms[seed]

    def _given_lm(self, seed: int) -> LM:
        from knnext.lm.load import load_lm

        if seed:
            raise ValueError(
                f"model {self.preset.model} is given as it is: there is none of seed {seed}"
            )
        options = {"model_dtype": "checkpoint", **self.preset.model_options}
        if "device_map" not in options:
            options["device"] = self.device
        place = {"path": str(self.preset.model), **options}
        model, _ = load_lm(**place)
        return LM(model, self.tokenizer, self._text_settings, 0, place)

    def _trained_lm(self, seed: int) -> LM:
        from knnext.lm.load import load_lm, save_lm
        from knnext.lm.train import train_lm
        from knnext.output import write_json

        config = replace(self.preset.train, seed=seed)
        steps = self.preset.train_steps
        settings = {**self._text_settings, "train": asdict(config), "steps": steps}

        def make(folder: Path) -> None:
            with self.step(f"train the language model of seed {seed} for {steps:,} steps"):
                trained = train_lm(
                    self.text("train").tokens,
                    self.tokenizer,
                    config,
                    max_steps=steps,
                    device=self.device,
                )
                save_lm(folder, trained.model, self.tokenizer)
                write_json(
                    folder / "training.json",
                    {
                        "seconds": trained.seconds,
                        "tokens": trained.tokens,
                        "losses": trained.losses,
                    },
                )

        place: dict[str, Any] = {
            "path": str(self.cache.get("lm", settings, make)),
            "device": self.device,
        }
        model, _ = load_lm(**place)
        return LM(model, self.tokenizer, settings, seed, place)

    def states(self, split: str, key_layer: str = "att", lm: LM | None = None) -> States:
        """The states of `"valid"` or `"test"` at a layer, float32 on the CPU."""
        arrays = self._state_arrays(split, key_layer, lm or self.lm())
        return States(arrays["keys"], arrays["targets"])

    def split(self, name: str, lm: LM | None = None) -> Split:
        """Targets, log p_lm and denominators of `"valid"` or `"test"`."""
        lm = lm or self.lm()
        key = (settings_key(lm.settings), name)
        if key not in self._splits:
            arrays = self._state_arrays(name, "att", lm)
            scores = self._scores(name, arrays)
            self._splits[key] = Split(
                name,
                scores.log_p_lm.double(),
                scores.targets,
                scores.document_ids,
                TextCounts.of(scores),
            )
        return self._splits[key]

    def splits(self, lm: LM | None = None) -> tuple[Split, Split]:
        """(valid, test)."""
        return self.split("valid", lm), self.split("test", lm)

    def lm_logits(self, split: str, lm: LM | None = None) -> Tensor:
        """(n, V) float32 logits of the LM, from its `"ffn"` states and output layer; see
        `check_output_layer`."""
        lm = lm or self.lm()
        self.check_output_layer(lm)
        return _logits(self.states(split, "ffn", lm).keys, lm)

    def check_output_layer(self, lm: LM | None = None) -> None:
        """ValueError where the LM's logits are not W h + b: where it scales or caps them."""
        lm = lm or self.lm()
        states, head = self.states("valid", "ffn", lm), slice(0, 256)
        log_p = _logits(states.keys[head], lm).log_softmax(1)
        found = log_p.gather(1, states.targets[head, None]).squeeze(1).double()
        worst = float((found - self.split("valid", lm).log_p_lm[head]).abs().max())
        if worst > _LINEAR_TOLERANCE:
            raise ValueError(
                f"{type(lm.model).__name__} does more with its logits than W h + b (log p differs "
                f"by up to {worst:.2g}), so experiments that need them cannot run on it"
            )

    def _state_arrays(self, split: str, key_layer: str, lm: LM) -> dict[str, Tensor]:
        if split not in EVALUATED:
            raise ValueError(f"split must be one of {EVALUATED}, got {split!r}")
        settings = {
            "lm": lm.settings,
            "text": {**self._text_settings, "split": split, **self._text_sizes},
            "key_layer": key_layer,
            **self._windows,
        }

        def make(folder: Path) -> None:
            with self.step(f"run the model over {split} ({key_layer})"):
                keys, targets, log_p_lm = passes.run_model(
                    self, lm.model, self.text(split), key_layer, self._windows, lm.place
                )
                arrays = {"keys": keys, "targets": targets, "log_p_lm": log_p_lm}
                np.savez(
                    folder / "states.npz",
                    allow_pickle=False,
                    **{n: a.numpy() for n, a in arrays.items()},
                )

        path = self.cache.get("states", settings, make) / "states.npz"
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}

    def _scores(self, split: str, arrays: Mapping[str, Tensor], **found: Tensor) -> StreamScores:
        """Scores of a split without neighbors, or with those found."""
        from knnext.evaluation.stream import describe_stream

        count = arrays["targets"].shape[0]
        empty: dict[str, Any] = {
            "distances": torch.empty(count, 0, dtype=torch.float32, device="cpu"),
            "tokens": torch.empty(count, 0, dtype=torch.int32, device="cpu"),
        }
        shared = describe_stream(self.text(split), arrays["targets"], arrays["log_p_lm"])
        return StreamScores(**shared, **{**empty, **found})

    @property
    def _windows(self) -> dict[str, Any]:
        p = self.preset
        return {"block_size": p.block_size, "stride": p.stride, "batch_size": p.batch_size}

    @property
    def _text_sizes(self) -> dict[str, Any]:
        p = self.preset
        return {"tokens": [p.valid_tokens, p.test_tokens], "most": p.document_tokens}


def _logits(states: Tensor, lm: LM) -> Tensor:
    logits = states @ lm.output_embedding.T
    return logits if lm.output_bias is None else logits + lm.output_bias
