"""Keys of several layers side by side, from one run: what single runs give, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from knnext.lm.hidden_states import find_key_modules, hidden_states
from tests.datastore.test_build import WINDOWS
from tests.lm.tiny_models import CONFIGS, random_tokens, tiny


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"mamba"}))  # it has no feed-forward
@pytest.mark.parametrize("wanted", [{}, {"with_log_p_lm": True}, {"with_logits": True}])
def test_states_are_those_of_single_runs(name: str, wanted: dict[str, bool]) -> None:
    model, tokens = tiny(name), random_tokens(50)
    sizes: dict[str, Any] = {**WINDOWS, **wanted}
    alone = {
        layer: list(hidden_states(model, tokens, key_layer=layer, **sizes))
        for layer in ("att", "ffn")
    }
    for layers in ("att+ffn", "ffn+att"):
        found = list(hidden_states(model, tokens, key_layer=layers, **sizes))
        singles = [alone[layer] for layer in layers.split("+")]
        for ours, left, right in zip(found, *singles, strict=True):
            assert torch.equal(ours.keys, torch.cat([left.keys, right.keys], 1))
            for kind in ("log_p_lm", "lm_logits"):
                mine, theirs = getattr(ours, kind), getattr(left, kind)
                if theirs is None:
                    assert mine is None
                else:
                    torch.testing.assert_close(mine, theirs)


def test_a_layer_twice_and_an_unknown_one_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"twice: 'att\+att'"):
        find_key_modules(model, "att+att")
    with pytest.raises(ValueError, match="got 'tta'"):
        find_key_modules(model, "att+tta")
    with pytest.raises(ValueError, match="got ''"):
        find_key_modules(model, "att+")
