"""Ways to the mixture in transformers' generate, for tests: KNNLM, KNNLogitsProcessor, and by hand.

What the two are held to runs the mixture over the whole text at every step, with no cache and no
hooks of a processor: ``Whole``, which throws away the scores that it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knnext import KNNLM, KNNLogitsProcessor
from tests.lm.test_knnlm import index_of
from tests.lm.tiny_models import random_tokens

TEXT = random_tokens(60)
PROMPTS = torch.stack([TEXT[:8], TEXT[20:28], random_tokens(8, seed=9)])
FAMILIES = ["gpt2", "llama", "mpt"]  # mpt's prompt gives the logits of all its positions
OPTIONS: dict[str, Any] = {"k": 4, "temperature": 0.5, "lmbda": 0.6}
PLAIN = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}


@dataclass
class Whole:
    """Scores of the mixture over all tokens so far."""

    lm: KNNLM

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        with torch.no_grad():
            return self.lm(ids).logits[:, -1]


Continue = Callable[..., Any]


@dataclass
class Ways:
    model: Any
    lm: KNNLM
    processor: KNNLogitsProcessor

    def whole(self, ids: Tensor, **options: Any) -> Any:
        # A copy, for within a KNNLM's pass the model's hooks would see another pass.
        return copy.copy(self.model).generate(ids, logits_processor=[Whole(self.lm)], **options)

    def lm_way(self, ids: Tensor, **options: Any) -> Any:
        return self.lm.generate(ids, **options)

    def processor_way(self, ids: Tensor, **options: Any) -> Any:
        return self.model.generate(ids, logits_processor=[self.processor], **options)

    @property
    def both(self) -> list[Continue]:
        return [self.lm_way, self.processor_way]


@contextmanager
def ways_of(model: Any, **options: Any) -> Iterator[Ways]:
    index, options = index_of(model, TEXT), OPTIONS | options
    with KNNLogitsProcessor(model, index, **options) as processor:
        yield Ways(model, KNNLM(model, index, **options), processor)
