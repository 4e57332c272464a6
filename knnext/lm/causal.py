"""Refuses models that see the future: in their states the next token is already written.

A datastore pairs the state at position i with the token at i + 1, and perplexity asks for that
token's probability. A model whose state at i depends on later tokens (BERT and its kin as encoders,
XLNet, models that read a whole text before they write) answers both by copying. Its numbers look
excellent and mean nothing.

Encoder-decoders are known by their config. The rest is tried, once for each model: a few tokens,
the states that the output layer reads, and two questions. Has an early state a derivative by a
later embedding? In a causal model it is exactly 0, in every dtype. And do early states change when
the later tokens do? That also sees what is not differentiable (a sort, a routing by capacity); it
has to be seen for several changes and be larger than rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from knnext.errors import ModelError
from knnext.lm.positions import Place, at_place, dependence, positions_first
from knnext.lm.quantized import is_quantized
from knnext.lm.running import context_length, evaluating, num_known_tokens, trace_inputs

#: Tokens of the trial, or as many as the model reads; the first half must not see the second.
_TRIAL_LENGTH = 16
_TRIALS = 3
#: Above this share of the change where tokens changed, a change before them is no rounding.
_SHARE = {torch.float64: 1e-6, torch.float32: 1e-3}
#: Layers that round what they read by what they read beside it (eight bits, one scale for all) let
#: a change through in their rounding.
_SHARE_HALF = 0.05

_causal: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class NotCausalError(ModelError):
    """The model's states depend on tokens that come after them."""


def check_causal(model: nn.Module) -> None:
    """NotCausalError (a ValueError) where a state of the model depends on later tokens.

    A model object is tried once, in the attention that it runs with. ModelError (a ValueError)
    also where it has not one state for each token, none that is finite, or fails on tokens by
    themselves.
    """
    if model in _causal:
        return
    check_config(getattr(model, "config", None), type(model).__name__)
    length = min(context_length(model) or _TRIAL_LENGTH, _TRIAL_LENGTH)
    if length > 1:
        with evaluating(model):
            with _explained(model):
                states = _states(model, length, 0)
            if states is not None and not bool(states.isfinite().all()):
                raise ModelError(
                    f"{type(model).__name__} gives states that are not finite for {length} tokens: "
                    "a weight of it is not, or it overflows in its dtype"
                )
            slopes = _slopes(model, length)
            if slopes is not None and bool(slopes[length // 2 :].any()):
                raise NotCausalError(_refusal(model, length))
            if _changes(model, length, states):
                raise NotCausalError(_refusal(model, length))
    _causal.add(model)


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """ModelError for what a model says that wants more than tokens (an image, a state)."""
    try:
        yield
    except (torch.OutOfMemoryError, ModelError):
        raise
    except Exception as error:  # models raise what they like
        text = (
            f"{type(model).__name__} fails on tokens by themselves, which is how knnext reads a "
            f"model: {type(error).__name__}: {error}"
        )
        if inside := _language_models(model):
            text += f". Give the language model inside it: {' or '.join(inside)}"
        raise ModelError(text) from error


def _language_models(model: nn.Module) -> list[str]:
    """``model.NAME (its class)`` of the parts that generate by themselves."""
    found = []
    for name, part in model.named_modules():
        can_generate = getattr(part, "can_generate", None)
        if name and callable(can_generate) and can_generate():
            found.append(f"model.{name} ({type(part).__name__})")
    return found


def check_config(config: Any, name: str) -> None:
    """NotCausalError for the config of an encoder-decoder."""
    if getattr(config, "is_encoder_decoder", False) is True:
        kind = getattr(config, "model_type", name)
        raise NotCausalError(
            f"{kind} is an encoder-decoder: its states depend on the whole text, also on the token "
            "to be predicted; knnext needs a causal (decoder-only) language model"
        )


def _refusal(model: nn.Module, length: int) -> str:
    text = (
        f"{type(model).__name__} sees the future: in a trial of {length} tokens, states of the "
        f"first {length // 2} depend on the tokens after them. The token to be predicted would be "
        "in its own key; knnext needs a causal (left-to-right) language model"
    )
    if getattr(getattr(model, "config", None), "is_decoder", None) is False:
        text += " (its config has is_decoder=False: as trained, it reads both ways)"
    return text


def _seen(model: nn.Module) -> Place:
    """What the output layer reads, else what the model gives."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if isinstance(head, nn.Module) and any(module is head for module in model.modules()):
        return Place(head, "input")
    return Place(model, "output")


def _trial(model: nn.Module, length: int, number: int) -> dict[str, Any]:
    """Inputs whose first half is always the same; the second differs from trial to trial."""
    inputs = trace_inputs(model)
    device, size = inputs["input_ids"].device, num_known_tokens(model)
    usable = [i for i in range(min(size, 512)) if i not in _special(model)] or list(range(size))
    generator = torch.Generator().manual_seed(1234)
    chosen = torch.randint(len(usable), (length,), generator=generator, device="cpu")
    if number:
        generator.manual_seed(number)
        other = torch.randint(len(usable), (length,), generator=generator, device="cpu")
        chosen = torch.cat([chosen[: length // 2], other[length // 2 :]])
    ids = torch.tensor(usable, dtype=torch.int64, device="cpu")[chosen].to(device)
    return {**inputs, "input_ids": ids[None]}


def _special(model: nn.Module) -> set[int]:
    """Ids to which a config gives a meaning: padding, images, the ends of texts."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    found: set[int] = set()
    for name, value in values.items():
        if "token" in name and ("_id" in name or "index" in name):
            found.update(v for v in (value if isinstance(value, list) else [value]) if _whole(v))
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _slopes(model: nn.Module, length: int) -> Tensor | None:
    """(length,) how far the first half of the states depends on each embedding; None: unknown."""
    inputs = _trial(model, length, 0)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    slopes = dependence(
        lambda module: module(**inputs),
        model,
        Place(embedding, "output"),
        _seen(model),
        slice(0, length // 2),
        length,
    )
    return slopes if slopes is not None and bool(slopes[: length // 2].any()) else None


def _changes(model: nn.Module, length: int, was: Tensor | None) -> bool:
    """Whether each of several changes of the second half changes states of the first."""
    if was is None:
        return False
    share = _SHARE_HALF if is_quantized(model) else _SHARE.get(was.dtype, _SHARE_HALF)
    for number in range(1, _TRIALS + 1):
        now = _states(model, length, number)
        if now is None or now.shape != was.shape:
            return False
        change = (now.double() - was.double()).abs().amax(dim=1)
        early, late = change.split([length // 2, length - length // 2])
        if not bool(early.max() > share * late.max()):
            return False
    return True


def _states(model: nn.Module, length: int, number: int) -> Tensor | None:
    found: list[Tensor] = []
    with at_place(_seen(model), lambda tensor: found.append(tensor.detach().clone())):
        model(**_trial(model, length, number))
    first = positions_first(found[0], length) if found else None
    if first is None:
        return None
    streams = first.numel() // (length * first.shape[-1])
    if streams > 1:
        raise ModelError(
            f"{type(model).__name__} has {streams} states for each token, which its output layer "
            f"reads as {tuple(found[0].shape)}; knnext needs a causal language model of one"
        )
    return first.flatten(1)
