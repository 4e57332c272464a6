"""Sizes of the experiments: seconds for tests, minutes on two cores, a GPU, the paper's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from knnext.lm.train import TrainConfig


@dataclass(frozen=True)
class Preset:
    """What decides the result of an experiment, but for the experiment's own settings.

    Attributes:
        name: of the preset that this came from.
        corpus: see `load_corpus`; `max_bytes` caps its train split.
        model: folder or hub name of a causal LM to use as it is; None: train one.
        model_options: how that model is loaded: arguments of `load_lm`, where they are not its
            defaults, but that `model_dtype` is "checkpoint".
        train: shape and training of the LM where it is trained, for `train_steps` steps. Steps and
            not seconds: the same settings then mean the same model, on any machine.
        entries: at most so many rows of the datastore, by whole documents of the train split.
        valid_tokens, test_tokens: about so many scored tokens of each split.
        document_tokens: at most so many of one document, so that the figures speak for many.
        k: neighbors per token.
        block_size, stride: of the windows in which the LM reads; None: `hidden_states`' defaults.
        store_stride: of the datastore's windows; None: `stride`, or three quarters of a window.
        batch_size: windows at once.
        factory, nprobe, train_size: of the FAISS index; None: scaled from the paper's.
        seeds: one run of a trained part for each.
        steps: gradient steps that an experiment gives a trained part, scaled by its own factor.
        resamples: of the bootstrap over documents.
        options: settings of single experiments, by `experiment.option`; they override the
            defaults that the experiment's module holds.
    """

    name: str = "small"
    corpus: str = "stdlib"
    max_bytes: int | None = None
    model: str | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    train_steps: int = 2500
    entries: int = 400_000
    valid_tokens: int = 5_000
    test_tokens: int = 10_000
    document_tokens: int = 200
    k: int = 1024
    block_size: int | None = None
    stride: int | None = None
    store_stride: int | None = None
    batch_size: int = 32
    factory: str | None = None
    nprobe: int = 32
    train_size: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 400
    resamples: int = 1000
    options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def option(self, name: str, default: Any) -> Any:
        """The setting `experiment.option`, or the experiment's default."""
        return self.options.get(name, default)

    def with_options(self, **changes: Any) -> Preset:
        """The same with other values; None leaves a value as it is."""
        return replace(self, **{n: v for n, v in changes.items() if v is not None})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and for cache keys."""
        found = asdict(self)
        for name in ("model_options", "store_stride"):
            if not found[name]:  # as before there were any, for what was kept then
                del found[name]
        return found


TINY = Preset(
    name="tiny",
    train=TrainConfig(vocab_size=512, num_layers=2, dim=32, num_heads=2, block_size=32),
    max_bytes=400_000,
    train_steps=150,
    entries=20_000,
    valid_tokens=600,
    test_tokens=1_200,
    document_tokens=100,
    k=64,
    factory="IVF64,PQ8",
    nprobe=4,
    train_size=10_000,
    seeds=(0, 1),
    steps=30,
    resamples=200,
)

SMALL = Preset()

GPU = Preset(
    name="gpu",
    train=TrainConfig(
        vocab_size=16_384,
        num_layers=8,
        dim=512,
        num_heads=8,
        block_size=512,
        batch_size=32,
        learning_rate=1e-3,
    ),
    train_steps=3000,
    entries=20_000_000,
    valid_tokens=30_000,
    test_tokens=60_000,
    document_tokens=1_000,
    factory="IVF4096,PQ64",
    steps=4000,
)

#: WikiText-103 and the sizes of the paper (its BPE has 33,344 entries; its optimizer is NAG where
#: this loop has AdamW; its position encoding is sinusoidal where GPT-2's is learned; its dropout is
#: 0.3, and 0.1 in attention and feed-forward blocks, where this model has one for all).
PAPER = Preset(
    name="paper",
    corpus="hf:Salesforce/wikitext:wikitext-103-raw-v1",
    train=TrainConfig(
        vocab_size=33_344,
        num_layers=16,
        dim=1024,
        num_heads=8,
        block_size=3072,
        batch_size=24,
        learning_rate=5e-4,
        min_rate=0.01,
        warmup=16_000 / 286_000,
        dropout=0.1,
    ),
    train_steps=286_000,
    entries=112_735_284,
    valid_tokens=10**9,
    test_tokens=10**9,
    document_tokens=10**9,
    block_size=3072,
    stride=512,
    batch_size=4,
    factory="IVF4096,PQ64",
    train_size=1_000_000,
    steps=100_000,
)

#: A finished LM of some hundred million parameters (`--model`; SmolLM2-135M for the figures of
#: docs/results) at the paper's k / N: its "5 %" store has as many rows without their padding.
#: Every token of the store is read 1.14 times.
PRETRAINED = Preset(
    name="pretrained",
    entries=5_637_248,
    valid_tokens=10_000,
    test_tokens=20_000,
    block_size=512,
    store_stride=448,
    batch_size=4,
    factory="IVF4096,PQ64",
    train_size=262_144,
)

#: The same k / N for two processor cores: k and N are less than a fifth. FAISS visits the same
#: share of its lists, 0.78 %.
PRETRAINED_1M = PRETRAINED.with_options(
    name="pretrained-1m",
    entries=1_000_000,
    valid_tokens=5_000,
    test_tokens=12_000,
    k=182,
    factory="IVF2048,PQ64",
    nprobe=16,
    train_size=131_072,
    options={"datastore-size.fractions": (0.05, 0.1, 0.25, 0.5, 1.0)},
)

PRESETS: dict[str, Preset] = {
    p.name: p for p in (SMALL, PRETRAINED, PRETRAINED_1M, GPU, PAPER, TINY)
}


def preset(name: str) -> Preset:
    """A preset by name. ValueError, with the names there are, for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]
