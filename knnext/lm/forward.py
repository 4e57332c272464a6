"""One forward pass that gives keys, and as little of the output layer as the caller needs.

The output layer is the dearest part of a small model (V x D per token, and V floats per row), so
it is run only on the wanted rows, and not at all when only keys are asked for. That is allowed
where the model's logits are its output layer applied to its base model's output, bit for bit. A
short pass tells; models that do more (soft caps, scales, projections) are run whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from knnext.lm.compiled import uncompiled
from knnext.lm.key_layer import (
    CapturedStates,
    KeyModule,
    capture_hidden_states,
    find_key_module,
)
from knnext.lm.running import evaluating, first_tensor, here, input_device, trace_inputs
from knnext.lm.wrapped import plain_model

#: Bytes of float32 logits held at once while log-probabilities are taken.
_LOGITS_BYTES = 64 << 20


class ModelForward:
    """Calls a causal LM for keys, target log-probabilities and logits of chosen positions.

    All of them come out where the model's tokens go in (``device``), also of a model that is spread
    over several devices.
    """

    def __init__(
        self,
        model: nn.Module,
        keys: Sequence[KeyModule],
        with_log_p_lm: bool,
        with_logits: bool,
    ) -> None:
        model = plain_model(model)
        #: Whose states stand side by side in a key.
        self.model, self.keys = model, tuple(keys)
        self.with_log_p_lm, self.with_logits = with_log_p_lm, with_logits
        self.device = input_device(model)
        base, head = _plain_parts(model)
        inner = set() if base is None else {id(module) for module in base.modules()}
        #: Keys that the output layer reads, which are the base model's output.
        self._of_head = [k for k in self.keys if k.module is head and k.side == "input"]
        #: All keys are read in the base model, where ``logits_to_keep`` cuts nothing off yet.
        self._keys_in_base = all(id(k.module) in inner for k in self.keys)
        usable = head is not None and all(
            k in self._of_head or id(k.module) in inner for k in self.keys
        )
        self._base, self._head = (base, head) if usable else (None, None)
        self._can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._extra = {"use_cache": False} if "use_cache" in trace_inputs(model) else {}

    def __call__(
        self, ids: Tensor, wanted: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(keys (n, D), log_p_lm (n,) or None, logits (n, V) or None) of the n wanted cells.

        ``ids`` (B, L) int64, ``targets`` (n,) int64 in the cells' order; ``wanted`` (B, L) bool on
        the CPU, so that nobody waits for a GPU to count them.
        """
        with evaluating(self.model):
            if self._base is not None and self._head is not None:
                states, head_input = self._run_base(self._base, ids, wanted)
                return states, *self._apply_head(self._head, head_input, targets)
            states, logits = self._run_whole(ids, wanted)
            log_p = _log_p(logits, targets) if self.with_log_p_lm and logits is not None else None
            return states, log_p, logits if self.with_logits else None

    def _run_base(self, base: nn.Module, ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        with self._captured(without=self._of_head) as captured:
            output = _chosen(_last_state(base(input_ids=ids, **self._extra)), wanted)
        return self._states(captured, wanted, output), output

    @contextmanager
    def _captured(self, without: Sequence[KeyModule] = ()) -> Iterator[list[CapturedStates | None]]:
        """What is to read each of the keys; None for those ``without``."""
        with ExitStack() as stack:
            yield [
                None
                if key in without
                else stack.enter_context(capture_hidden_states(self.model, key))
                for key in self.keys
            ]

    def _states(
        self,
        captured: Sequence[CapturedStates | None],
        wanted: Tensor,
        output: Tensor | None = None,
    ) -> Tensor:
        """(n, D) of the wanted cells; ``output`` is that of keys which nothing captured."""
        parts = [output if one is None else self._states_of(one, wanted) for one in captured]
        found = [part for part in parts if part is not None]
        return found[0] if len(found) == 1 else torch.cat([p.to(self.device) for p in found], 1)

    def _states_of(self, captured: CapturedStates, wanted: Tensor) -> Tensor:
        """(n, D) of one key; the model may have run its last positions only."""
        states, length = captured.states(len(wanted)), wanted.shape[1]
        if states.shape[1] > length:
            raise ValueError(
                f"{captured.key} has {states.shape[1]} states for {length} tokens, where knnext "
                "needs one for each: several streams, or padding; name another module as the key "
                "layer"
            )
        return _chosen(states, wanted[:, length - states.shape[1] :])

    def _apply_head(
        self, head: nn.Module, states: Tensor, targets: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.with_logits:
            logits = head(states).to(targets.device)
            return (_log_p(logits, targets) if self.with_log_p_lm else None), logits
        if not self.with_log_p_lm:
            return None, None
        rows = max(1, _LOGITS_BYTES // (4 * _num_outputs(head)))
        parts = [
            _log_p(head(part), wanted)
            for part, wanted in zip(states.split(rows), targets.split(rows), strict=True)
        ]
        return (torch.cat(parts) if parts else targets.new_empty(0, dtype=torch.float32)), None

    def _run_whole(self, ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        length = ids.shape[1]
        extra: dict[str, Any] = dict(self._extra)
        if self._can_keep:
            only_keys = not (self.with_log_p_lm or self.with_logits)
            first = int(wanted.any(dim=0).int().argmax())
            extra["logits_to_keep"] = 1 if only_keys and self._keys_in_base else length - first
        with self._captured() as captured:
            output = self.model(input_ids=ids, **extra)
        states = self._states(captured, wanted)
        if not (self.with_log_p_lm or self.with_logits):
            return states, None
        logits = output.logits
        return states, _chosen(logits, wanted[:, length - logits.shape[1] :])


def _chosen(tensor: Tensor, wanted: Tensor) -> Tensor:
    """(n, ...) cells of a (B, L, ...) tensor, on the device of ``wanted`` (B, L) bool."""
    return tensor[wanted.to(tensor.device)].to(wanted.device)


def _plain_parts(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The base model, and the output layer where head(base(x)) is all that the model does."""
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return None, None
    try:
        head = find_key_module(model, "ffn").module
    except ValueError:
        return base, None
    outputs: list[Any] = []
    handle = base.register_forward_hook(here(lambda *call: outputs.append(call[-1])))
    try:
        with evaluating(model), uncompiled(model):
            logits = model(**trace_inputs(model)).logits
            given = head(_last_state(outputs[0])).to(logits.device) if len(outputs) == 1 else None
            plain = given is not None and torch.equal(given, logits)
    except (AttributeError, RuntimeError, TypeError):
        plain = False  # whatever it does, it is more than that
    finally:
        handle.remove()
    return base, head if plain else None


def _cells(values: Tensor, wanted: Tensor) -> Tensor:
    """(n, D) of (B, L, D) where ``wanted`` (B, L), on the CPU, is set."""
    chosen = wanted.flatten().nonzero().squeeze(1)
    return values.flatten(0, 1)[chosen.to(values.device)]


def _last_state(output: Any) -> Tensor:
    state = getattr(output, "last_hidden_state", None)
    found = state if state is not None else first_tensor(output)
    if found is None:
        raise RuntimeError(f"the base model gave no hidden state, but {type(output).__name__}")
    return found


def _num_outputs(head: nn.Module) -> int:
    size = getattr(head, "out_features", None)  # which also packed weights have
    return size if isinstance(size, int) else max(p.shape[0] for p in head.parameters())


def _log_p(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.to(targets.device).float()
    target = logits.gather(1, targets.to(logits.device)[:, None]).squeeze(1)
    return target - logits.logsumexp(dim=1)
