"""Windows that begin with bos: what their states see, and which tokenizers ask for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from knnext.corpus import Document, window_bos
from knnext.lm.hidden_states import hidden_states
from knnext.lm.train import train_tokenizer
from tests.lm.tiny_models import random_tokens, tiny

BOS = 1


def states(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.cat([b.keys for b in hidden_states(model, tokens, dtype=torch.float32, **options)])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_each_window_is_read_behind_bos(kind: str) -> None:
    model, tokens = tiny(kind), random_tokens(50)
    tokens[0] = BOS
    found = states(model, tokens, block_size=16, stride=8, batch_size=2, bos=BOS)
    for first in range(0, 40, 8):
        window = tokens[first : first + 17].clone()
        window[0] = BOS
        alone = states(model, window, block_size=16, stride=8)
        new = 0 if first == 0 else 8
        wanted = alone[new : len(window) - 1]
        torch.testing.assert_close(found[first + new : first + new + len(wanted)], wanted)
    assert not torch.equal(found, states(model, tokens, block_size=16, stride=8, batch_size=2))
    # The first window, and a stream of one, have it from the stream.
    assert torch.equal(found[:16], states(model, tokens, block_size=16, stride=8)[:16])


def test_a_resumed_run_gives_the_same_bits() -> None:
    model, tokens = tiny("gpt2"), random_tokens(60)
    options = {"block_size": 16, "stride": 8, "batch_size": 2, "bos": BOS}
    whole = states(model, tokens, **options)
    assert torch.equal(states(model, tokens, start=23, **options), whole[23:])


def test_a_first_token_that_is_due_a_state_is_kept() -> None:
    with pytest.raises(ValueError, match=r"stride must be below block_size=16 .* got 16"):
        hidden_states(tiny("gpt2"), random_tokens(60), block_size=16, stride=16, bos=BOS)
    assert len(states(tiny("gpt2"), random_tokens(17), block_size=16, stride=16, bos=BOS)) == 16


def test_the_tokenizer_says_whether_it_sets_bos() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer([Document("a", "some text " * 20)], 270)
    assert window_bos(tokenizer) is None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    assert window_bos(tokenizer) == tokenizer.bos_token_id
    assert window_bos(object()) is None
