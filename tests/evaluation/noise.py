"""A model, a text and an index without sense, for what does not depend on sense."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnext.corpus import TokenizedDocuments
from knnext.lm.hidden_states import HiddenStatesBatch

VOCAB = 40


def tiny_gpt2() -> Any:
    """Two layers of width 16, a context of 32 tokens, 40 words; 0 is bos and eos."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


def text_of(*lengths: int) -> TokenizedDocuments:
    """Documents of so many tokens, each led by 0."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.random.default_rng(0).integers(1, VOCAB, size=offsets[-1]).astype(np.int32)
    tokens[offsets[:-1]] = 0
    words = np.asarray(lengths) - 1
    return TokenizedDocuments(tokens, offsets, [f"d{i}" for i in range(len(lengths))], words, words)


def noise_states(_: Any, tokens: TokenizedDocuments, **options: Any) -> Iterator[HiddenStatesBatch]:
    """In the place of `hidden_states`: as many states, without a model."""
    stream = torch.as_tensor(tokens.tokens).long()
    for positions in torch.arange(len(stream) - 1).split(100):
        keys = torch.randn(len(positions), 16, dtype=torch.float32).to(options["dtype"])
        log_p = -torch.rand(len(positions))
        yield HiddenStatesBatch(positions, keys, stream[positions + 1], log_p)


class NoiseIndex:
    """Finds other rows for each query at once, without any being there."""

    def __init__(self, rows: int = 5000) -> None:
        self.rows, self.metric = rows, "l2"
        meta = SimpleNamespace(origin=None)
        self.datastore: Any = SimpleNamespace(
            fingerprint="noise",
            key_layer="att",
            dtype=torch.float16,
            dim=16,
            meta=meta,
            document_hashes=None,
        )

    def search(self, queries: Tensor, k: int, excluded: Any = None) -> tuple[Tensor, Tensor]:
        distances = torch.rand(len(queries), k).sort(1).values
        return distances, torch.randint(0, self.rows, (len(queries), k))

    def tokens(self, indices: Tensor) -> Tensor:
        return (indices % VOCAB).to(torch.int32)
