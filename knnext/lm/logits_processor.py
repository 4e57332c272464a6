"""The kNN-LM as a logits processor, for code that takes one and cannot take another model.

A processor is given scores and no states. So hooks on the model keep what its latest forward pass
in this thread gave, the key layer's states beside the logits. The scores must be those logits, or
their log-softmax, as beam search has them: that is checked at each step, and it tells which
position of the pass is meant where there are several, as in assisted decoding.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from knnext.lm.compiled import compiled_around
from knnext.lm.key_layer import KeyModule
from knnext.lm.knnlm import KNNLM
from knnext.lm.running import Hook, first_tensor

#: Between log-probabilities of the same logits, rounded in two ways.
_TOLERANCE = 1e-3
_CHANGED = (
    "the scores are not the logits of the model's latest forward pass: another model made them, or "
    "a processor before this one changed them. Those that generate makes of its options "
    "(repetition_penalty, no_repeat_ngram_size, min_new_tokens, suppress_tokens, guidance_scale) "
    "stand before all that it is given: leave the option out, also of generation_config, and give "
    "its processor after this one. With an assistant model, which is given these processors too, "
    "use KNNLM"
)
_UNSEEN = (
    "no forward pass of the model was seen in this thread: generate must run the model that this "
    "processor was made with, not a copy or a compiled form of it (a static cache on a GPU needs "
    "disable_compile=True). With an assistant model, which is given this processor first, use KNNLM"
)
_CLOSED = "this processor is closed: generate inside its `with` block"


class KNNLogitsProcessor:
    """Turns scores into log p of the mixture: what ``KNNLM.generate`` decodes with::

        with KNNLogitsProcessor(model, index, k, temperature, lmbda) as neighbors:
            model.generate(**inputs, logits_processor=[neighbors])

    It comes first among the processors, so that penalties act on the mixture. Greedy search, beams,
    sampling, prompt lookup, early exit and batches padded on the left give the mixture's tokens;
    other assistant models are for KNNLM. Several threads may generate with one. It keeps hooks on
    the model until ``close``, the end of a ``with`` block, or until nobody has it any more. A copy
    of the model, deep or pickled, is a plain model.

    Args:
        model, index, k, temperature, lmbda, key_layer: as of ``KNNLM``. With the number 0 as lmbda
            scores stay as they are.

    ValueError where KNNLM has one, and where the key layer lies in compiled code, which takes no
    hooks. RuntimeError at a step whose scores are not those of the model's latest forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        index: Any,
        k: int = 1024,
        temperature: float | Tensor = 1.0,
        lmbda: float | Tensor = 0.25,
        *,
        key_layer: str | None = None,
    ) -> None:
        self._lm = KNNLM(model, index, k, temperature, lmbda, key_layer=key_layer)
        base, key = self._lm._base, self._lm._key
        for module in (model, base):
            if names := compiled_around(module, key.module):
                raise ValueError(
                    f"{key} lies in compiled code ({names[0] or type(base).__name__}), which takes "
                    "no hooks: compile the other blocks alone, by load_lm(compile=True), or use "
                    "KNNLM"
                )
        self._passes = _Passes()
        self.close = weakref.finalize(self, _put_on(base, key, self._passes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a KNNLogitsProcessor is of one model and is not copied or pickled: make one for the "
            "copy of the model"
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores of the next tokens to (B, V) float32 log p of the mixture."""
        lmbda = self._lm.lmbda
        if not isinstance(lmbda, Tensor) and lmbda == 0:
            return scores
        if not self.close.alive:
            raise RuntimeError(_CLOSED)
        if self._passes.draft:
            return scores  # what a draft proposes is held against the mixture by a whole pass
        found = self._passes.latest
        position = None if found is None else _position(found[0], scores)
        if position is None and bool((scores == scores[:, :1]).all()):
            return scores  # prompt lookup asks with ones which tokens are forbidden: none
        if found is None:
            raise RuntimeError(_UNSEEN)
        if position is None:
            raise RuntimeError(_CHANGED)
        states = found[1]
        return self._lm._mix_rows(scores, states[:, position].to(scores.device))


class _Passes(threading.local):
    """What the latest forward pass in a thread gave: (B, n, V) logits, (B, n, D) states."""

    latest: tuple[Tensor, Tensor] | None = None
    states: Tensor | None = None
    #: Whether it was one without the last blocks, by early exit.
    draft: bool = False


def _put_on(model: nn.Module, key: KeyModule, passes: _Passes) -> Callable[[], None]:
    """Hooks that keep each pass; returns what takes them off."""
    layers = _num_layers(model)

    @torch.compiler.disable
    def keep(value: Any) -> None:
        states = first_tensor(value)
        passes.states = None if states is None else states.detach()

    def before_key(_: nn.Module, args: Any, kwargs: Any) -> None:
        keep((args, kwargs))

    def after_key(_: nn.Module, args: Any, output: Any) -> None:
        keep(output)

    @torch.compiler.disable
    def after_model(module: nn.Module, args: Any, output: Any) -> None:
        if module is not model:  # a shallow copy of it has its hooks
            return
        logits, states = getattr(output, "logits", None), passes.states
        passes.latest = passes.states = None
        passes.draft = _num_layers(model) != layers
        if isinstance(logits, Tensor) and states is not None:
            rows = states.reshape(len(logits), -1, states.shape[-1])
            # A prompt's states would be held for a step, where one is needed.
            rows = rows if rows.shape[1] == logits.shape[1] else rows[:, -logits.shape[1] :].clone()
            passes.latest = logits.detach(), rows

    if key.side == "input":
        reading = key.module.register_forward_pre_hook(Hook(before_key), with_kwargs=True)
    else:
        reading = key.module.register_forward_hook(Hook(after_key))
    handles = (reading, model.register_forward_hook(Hook(after_model)))

    def take_off() -> None:
        for handle in handles:
            handle.remove()

    return take_off


def _num_layers(model: nn.Module) -> Any:
    """What early exit changes for the length of a draft."""
    return getattr(getattr(model, "config", None), "num_hidden_layers", None)


def _position(logits: Tensor, scores: Tensor) -> int | None:
    """The position of (B, n, V) logits that (B, V) scores are of, from the last; None: of none."""
    if len(logits) != len(scores) or logits.shape[-1] != scores.shape[-1]:
        return None
    wanted = scores.float().log_softmax(dim=-1)
    for position in range(logits.shape[1] - 1, -1, -1):
        log_p = logits[:, position].float().log_softmax(dim=-1).to(wanted.device)
        if torch.allclose(log_p, wanted, rtol=0, atol=_TOLERANCE):
            return position
    return None
