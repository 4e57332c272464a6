"""Texts that a model reads side by side, a token a step, with the key-layer state behind each.

Texts of unequal length stand right-aligned in one batch, with padding on their left that a mask
hides. Whether a model takes that is not looked up: a trial reads two texts together and alone, and
where the answers differ, or its cache is of another kind, every text is read by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from knnext.lm.batching import length_matters
from knnext.lm.key_layer import capture_hidden_states, find_key_module
from knnext.lm.running import context_length, evaluating, input_device, trace_length
from knnext.lm.wrapped import plain_model

#: How far two readings of one text may be apart, as a share of what they are: for rounding alone.
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}
_CLOSE_ELSE = 5e-2


@dataclass
class Rows:
    """Texts in one cache, one a row.

    Attributes:
        cache: the model's, or None where it keeps none.
        lengths: tokens of each text that are in the cache.
        width: columns of the cache; a row has ``width - length`` of padding, on its left.
    """

    cache: Any = None
    lengths: list[int] = field(default_factory=list)
    width: int = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows, in this order, and no column that is padding in all of them."""
        lengths = [self.lengths[row] for row in rows]
        if list(rows) != list(range(len(self.lengths))):
            width = max(lengths, default=0)
            for layer in _filled(self.cache):
                chosen = torch.tensor(list(rows), dtype=torch.int64, device=layer.keys.device)
                layer.keys = layer.keys[:, :, self.width - width :].index_select(0, chosen)
                layer.values = layer.values[:, :, self.width - width :].index_select(0, chosen)
            self.lengths, self.width = lengths, width

    def join(self, other: Rows) -> None:
        """These rows and then those of ``other``, which is used up."""
        width = max(self.width, other.width)
        pairs = zip(_filled(self.cache), _filled(other.cache), strict=True)
        for mine, its in pairs:
            mine.keys = _stacked(mine.keys, its.keys, width)
            mine.values = _stacked(mine.values, its.values, width)
        self.lengths, self.width = self.lengths + other.lengths, width


class Reader:
    """Runs a causal LM over texts that grow.

    Args:
        model: a causal LM, as `knnext.KNNLM` takes it.
        key_layer: where the states are read.
        alone: each text is to be read by itself; nothing is tried then.

    Attributes:
        device: where the model's tokens go.
        together: whether texts of unequal length can stand in one batch.
    """

    def __init__(self, model: nn.Module, key_layer: str, *, alone: bool = False) -> None:
        self.model = plain_model(model)
        self._key = find_key_module(model, key_layer)
        self.device = input_device(self.model)
        known = inspect.signature(self.model.forward).parameters
        self._caches = "past_key_values" in known and "use_cache" in known
        self._keeps = "logits_to_keep" in known
        self._positions = "position_ids" in known
        self._masks = "attention_mask" in known
        self.together = False
        if self._caches and self._masks and not alone:
            self.together = self._can_be_together()

    @property
    def ends(self) -> frozenset[int]:
        """Tokens after which the model writes no more, where it says so."""
        config: Any = getattr(self.model, "generation_config", None) or self.model.config
        eos = getattr(config, "eos_token_id", None)
        return frozenset(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])

    def begin(
        self, texts: Sequence[list[int]], *, whole: bool = False
    ) -> tuple[Rows, list[Tensor], list[Tensor]]:
        """Rows of new texts, and for each (n, D) states and (n, V) logits.

        n is 1, for what follows the text, or with ``whole`` its number of tokens. Where texts
        cannot be ``together``, there must be one.
        """
        rows = Rows(lengths=[0] * len(texts))
        if self.together:
            from transformers import DynamicCache

            # Without the config its layers keep all columns, also of a sliding window.
            rows.cache = DynamicCache()
        return rows, *self._read(rows, texts, whole)

    def step(self, rows: Rows, texts: Sequence[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
        """The texts have grown by a token: of each, (1, D) states and (1, V) logits after it."""
        new = [text if rows.cache is None else text[-1:] for text in texts]
        return self._read(rows, new, False)

    def _read(
        self, rows: Rows, new: Sequence[list[int]], whole: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        longest = max(len(text) for text in new)
        ids = torch.tensor(
            [[0] * (longest - len(text)) + text for text in new], dtype=torch.int64, device="cpu"
        ).to(self.device)
        width = rows.width + longest
        lengths = [old + len(text) for old, text in zip(rows.lengths, new, strict=True)]
        options: dict[str, Any] = {"logits_to_keep": 1} if self._keeps and not whole else {}
        if self._caches:
            options |= {"use_cache": True, "past_key_values": rows.cache}
        if min(lengths) < width:
            options |= self._padding(lengths, width, longest)
        with evaluating(self.model), capture_hidden_states(self.model, self._key) as captured:
            output = self.model(input_ids=ids, **options)
            states = captured.states(len(new))
        if self._caches:
            rows.cache = getattr(output, "past_key_values", None)
        if rows.cache is not None:
            rows.lengths, rows.width = lengths, width
        wanted = [len(text) if whole else 1 for text in new]
        logits = output.logits
        return (
            [line[-count:] for line, count in zip(states, wanted, strict=True)],
            [line[-count:] for line, count in zip(logits, wanted, strict=True)],
        )

    def _padding(self, lengths: list[int], width: int, longest: int) -> dict[str, Any]:
        """What hides the padding, and counts each text's positions from its own beginning."""
        starts = torch.tensor([width - n for n in lengths], dtype=torch.int64, device=self.device)
        columns = torch.arange(width, device=self.device)
        found: dict[str, Any] = {"attention_mask": (columns >= starts[:, None]).long()}
        if self._positions:
            places = (columns - starts[:, None]).clamp(min=0)
            found["position_ids"] = places[:, width - longest :]
        return found

    def _can_be_together(self) -> bool:
        context = context_length(self.model)
        length = min(trace_length(self.model), (context or 8) - 1)
        if length < 3 or length_matters(self.model, context or 1 << 30):
            return False
        long = list(range(1, length + 1))
        short, one = long[: length // 2], long[:1]
        try:
            alone = [self._alone(text) for text in (long, short)]
            self.together = True
            mixed = self._in_company(long, short, one)
        except Exception:  # of models that take no mask, or no cache of ours, in what words ever
            return False
        finally:
            self.together = False
        close = _CLOSE.get(alone[0][0].dtype, _CLOSE_ELSE)
        return all(
            _are_close(mine, its, close)
            for a, b in zip(alone, mixed, strict=True)
            for mine, its in zip(a, b, strict=True)
        )

    def _alone(self, text: list[int]) -> list[Tensor]:
        """Logits and states after the text, and after one token more."""
        rows, states, logits = self.begin([text])
        more = self.step(rows, [[*text, 1]])
        return [states[0], logits[0], more[0][0], more[1][0]]

    def _in_company(self, long: list[int], short: list[int], one: list[int]) -> list[list[Tensor]]:
        """The same of two texts that are read together, beside a third that leaves them."""
        rows, states, logits = self.begin([one, short])
        other, *found = self.begin([long])
        if not all(_is_plain(r.cache, r.width) for r in (rows, other)):
            raise TypeError("the cache is no plain one")
        rows.join(other)
        rows.keep([2, 1])
        more = self.step(rows, [[*long, 1], [*short, 1]])
        return [
            [found[0][0], found[1][0], more[0][0], more[1][0]],
            [states[1], logits[1], more[0][1], more[1][1]],
        ]


def _filled(cache: Any) -> list[Any]:
    """The layers that hold something; others share what these hold."""
    return [layer for layer in cache.layers if layer.keys is not None]


def _is_plain(cache: Any, width: int) -> bool:
    from transformers.cache_utils import DynamicLayer

    layers = _filled(cache)
    return bool(layers) and all(
        type(layer) is DynamicLayer and layer.keys.shape[2] == layer.values.shape[2] == width
        for layer in layers
    )


def _stacked(first: Tensor, second: Tensor, width: int) -> Tensor:
    """(B, H, L, D) and (C, H, M, D) as (B + C, H, width, D), with zeros on the left."""
    size = (len(first) + len(second), first.shape[1], width, first.shape[3])
    found = first.new_zeros(size)
    found[: len(first), :, width - first.shape[2] :] = first
    found[len(first) :, :, width - second.shape[2] :] = second
    return found


def _are_close(first: Tensor, second: Tensor, close: float) -> bool:
    first, second = first.double(), second.double()
    return bool((first - second).norm() <= close * first.norm())
