"""A text that grows by one token a step, with the key-layer state behind each."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from knnext.lm.key_layer import capture_hidden_states
from knnext.lm.running import evaluating


class Writer:
    """Token ids and, where the model keeps one, its cache of them.

    Args:
        model: a causal LM.
        key_layer: where the states are read.
        ids: the text so far; append to it between steps.
    """

    def __init__(self, model: Any, key_layer: str, ids: list[int]) -> None:
        self.model, self.key_layer, self.ids = model, key_layer, list(ids)
        known = inspect.signature(model.forward).parameters
        self._caches = "past_key_values" in known and "use_cache" in known
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._cache: Any = None

    @property
    def ends(self) -> list[int]:
        """Tokens after which the model writes no more."""
        config = getattr(self.model, "generation_config", None) or self.model.config
        eos = getattr(config, "eos_token_id", None)
        return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [int(eos)]

    def step(self) -> tuple[Tensor, Tensor]:
        """(D,) state and (V,) logits after the last token."""
        new = self.ids if self._cache is None else self.ids[-1:]
        options: dict[str, Any] = dict(self._keep)
        if self._caches:
            options |= {"use_cache": True, "past_key_values": self._cache}
        given = torch.tensor([new], dtype=torch.int64, device=self.model.device)
        with evaluating(self.model), capture_hidden_states(self.model, self.key_layer) as captured:
            output = self.model(input_ids=given, **options)
            state = captured.states(1)[0, -1]
        if self._caches:
            self._cache = getattr(output, "past_key_values", None)
        return state, output.logits[0, -1]


def next_token(log_p: Tensor, generator: torch.Generator | None) -> int:
    """The likeliest of (V,) log p, or one drawn by them."""
    if generator is None:
        return int(log_p.argmax())
    return int(torch.multinomial(log_p.double().exp(), 1, generator=generator))
