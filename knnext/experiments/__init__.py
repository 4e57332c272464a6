"""The experiments of "Why do Nearest Neighbor Language Models Work?" (arXiv:2301.02828), and some
that it did not make.

The kNN-LM is one point of a family,

    p = (1 - lmbda) softmax(W_sm h_sm) + lmbda M softmax(mask_k(W_ds (x) h_ds) / t)

and each experiment here moves a few of its settings (`lab.family.Setting`) and holds the rest.
Every module has `DESCRIPTION`, `run(lab) -> Findings` and `plot(result, axes)`; see
`knnext.experiments.catalog` for their names and `knnext.experiments.run` to run them.
"""

from __future__ import annotations

from knnext.experiments.catalog import NAMES, load
from knnext.experiments.lab.presets import PRESETS, Preset, preset
from knnext.experiments.run import run_experiment

__all__ = ["NAMES", "PRESETS", "Preset", "load", "preset", "run_experiment"]
