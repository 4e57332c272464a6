"""A laboratory whose searches are written by hand: the answer of an experiment is then known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from knnext.evaluation.perplexity import TextCounts
from knnext.evaluation.scores import StreamScores
from knnext.experiments.lab import Lab
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.mixture import Split
from knnext.experiments.lab.presets import TINY

ROWS, DIM = 1000, 8


def scores_of(distances, tokens, targets, log_p_lm, documents=40) -> StreamScores:
    """Scores of n targets in documents of about the same size; a document has one word a token."""
    count = targets.shape[0]
    ids = torch.arange(count) % documents
    return StreamScores(
        log_p_lm=log_p_lm.float(),
        targets=targets.long(),
        document_ids=ids.sort().values,
        ends_document=torch.zeros(count, dtype=torch.bool),
        distances=distances.float(),
        tokens=tokens.int(),
        num_words=ids.bincount(minlength=documents),
        num_bytes=ids.bincount(minlength=documents) * 4,
    )


class PlantedLab(Lab):
    """`plant(setting, split)` is what a search finds. `searched` lists the calls."""

    def __init__(self, folder, plant: Callable[[Setting, str], StreamScores], **options) -> None:
        super().__init__(TINY.with_options(options=options), folder, say=lambda _line: None)
        self.plant, self.searched = plant, []

    def split(self, name, lm=None):
        scores = self.plant(Setting(), name)
        return Split(
            name,
            scores.log_p_lm.double(),
            scores.targets,
            scores.document_ids,
            TextCounts.of(scores),
        )

    def neighbors(self, setting, split, **options):
        self.searched.append((setting, split))
        return self.plant(setting, split)

    def store(self, key_layer="att", *, fraction=1.0, **options):
        return SimpleNamespace(num_entries=round(ROWS * fraction), dim=DIM)


def drawn_at(temperature, *, count=4000, k=8, seed=0, scale=10.0):
    """(distances, tokens, targets) of k neighbors with k tokens, the target drawn from
    softmax(-distances / temperature): no other temperature explains it better, but for chance."""
    generator = torch.Generator().manual_seed(seed)
    distances = (torch.rand(count, k, generator=generator) * scale).sort(1).values
    tokens = torch.rand(count, 50, generator=generator).argsort(1)[:, :k]
    chosen = torch.multinomial((-distances / temperature).softmax(1), 1, generator=generator)
    return distances, tokens, tokens.gather(1, chosen).squeeze(1)
