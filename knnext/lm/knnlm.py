"""The kNN-LM as a model: log p = log((1 - lmbda) p_lm + lmbda p_knn), in forward and generate.

The base model is wrapped and never edited. For the length of a call two hooks stand on it: one
reads the keys, the other puts the mixture where the logits were. ``generate`` is therefore the
base model's own, with its caches, masks, beams and processors; when the call ends, by a return or
an error, the hooks are gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from knnext.lm.key_layer import (
    CapturedStates,
    KeyModule,
    capture_hidden_states,
    find_key_module,
)
from knnext.lm.running import evaluating, trace_inputs
from knnext.ops import knn_interpolate

#: Ways of decoding that read the logits of more than the last position.
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens")
_IGNORED_LABEL = -100


class KNNLM(nn.Module):
    """A causal LM mixed with the neighbors of its hidden states.

    Args:
        model: a causal LM of transformers, in any float dtype, on any device.
        index: anything with ``search(queries, k) -> (distances, indices)`` and
            ``tokens(indices)``. Its ``datastore``, where it has one, gives the queries' dtype and
            the key layer, and is checked against the model.
        k: neighbors for each position.
        temperature: above 0, divides the distances; a number or a tensor ().
        lmbda: weight of p_knn, from 0 to 1; a number or a tensor (). The number 0 searches nothing.
        key_layer: "att", "ffn" or "module:NAME:input|output"; by default the datastore's.

    ValueError where an argument is out of range, or the datastore was built from another layer,
    width or vocabulary than this model has.
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
        super().__init__()
        _check_numbers(k, temperature, lmbda)
        datastore = getattr(index, "datastore", None)
        self.model, self.index = model, index
        self.k, self.temperature, self.lmbda = k, temperature, lmbda
        self.key_layer = _agreed_layer(key_layer, getattr(datastore, "key_layer", None))
        self._key = find_key_module(model, self.key_layer)
        self._dtype: torch.dtype | None = getattr(datastore, "dtype", None)
        self._attached = False
        _check_datastore(model, self._key, datastore)

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The base model's defaults for ``generate``."""
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the base model's inputs go."""
        device: torch.device = self.model.device  # type: ignore[assignment]
        return device

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's output with ``logits`` (B, L, V) float32, log p of the mixture.

        Positions that ``attention_mask`` (B, L) marks 0 are not searched and keep the LM's own
        log p. ``labels`` (B, L), -100 where ignored, give ``loss``: the mean nll of the mixture,
        shifted by one. ``logits_to_keep=n``, for models that know it, gives the last n positions
        only, and only these are searched. Other arguments go to the base model.
        """
        kwargs["return_dict"] = True  # after it, the logits can be replaced by name
        with self.attached():
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labels is not None:
            output.loss = _shifted_nll(output.logits, labels)
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the base model, fed with the mixture: same arguments, same result.

        Only the last position of each sequence is searched. With lmbda = 0 this is the base model.
        """
        if not isinstance(self.lmbda, Tensor) and self.lmbda == 0:
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]
        config = kwargs.get("generation_config")
        assisted = any(
            kwargs.get(name) is not None or getattr(config, name, None) is not None
            for name in _ASSISTED
        )
        kwargs.setdefault("disable_compile", True)  # a search cannot be compiled into the model
        with self.attached(last_only=not assisted):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def attached(self, last_only: bool = False) -> Iterator[nn.Module]:
        """Inside the block the base model itself gives the mixture's log p as its logits.

        For code that insists on a transformers model. ``last_only`` cuts the logits down to the
        last position. Yields the base model; inside another such block it changes nothing.
        """
        if self._attached:
            yield self.model
            return
        with capture_hidden_states(self.model, self._key) as captured:

            def mix(_: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> Any:
                if not isinstance(getattr(output, "logits", None), Tensor):
                    raise TypeError(
                        f"the base model gave {type(output).__name__} without logits by name; "
                        "call it with return_dict=True"
                    )
                output.logits = self._mixture(output.logits, captured, kwargs, last_only)
                captured.clear()
                return output

            handle = self.model.register_forward_hook(mix, with_kwargs=True)
            self._attached = True
            try:
                yield self.model
            finally:
                self._attached = False
                handle.remove()

    def _mixture(
        self, logits: Tensor, captured: CapturedStates, kwargs: dict[str, Any], last_only: bool
    ) -> Tensor:
        if not isinstance(self.lmbda, Tensor) and self.lmbda == 0:
            return logits.float().log_softmax(dim=-1)
        keys = _kept_positions(captured.states(len(logits)), logits, kwargs.get("logits_to_keep"))
        if last_only:
            logits, keys = logits[:, -1:], keys[:, -1:]
        rows, queries = logits.flatten(0, 1), keys.flatten(0, 1)
        seen = _seen(kwargs.get("attention_mask"), logits, kwargs.get("logits_to_keep"))
        if seen is None or bool(seen.all()):
            mixed = self._mix_rows(rows, queries)
        else:
            mixed = rows.float().log_softmax(dim=-1)
            mixed = mixed.index_put((seen,), self._mix_rows(rows[seen], queries[seen]))
        return mixed.view(logits.shape)

    def _mix_rows(self, logits: Tensor, queries: Tensor) -> Tensor:
        """(n, V) logits and (n, D) queries to (n, V) float32 log p of the mixture."""
        with torch.no_grad():
            wanted = queries if self._dtype is None else queries.to(self._dtype)
            distances, indices = self.index.search(wanted, self.k)
            tokens = self.index.tokens(indices)
        device = logits.device
        return knn_interpolate(
            logits, distances.to(device), tokens.to(device), self.temperature, self.lmbda
        )


def _check_numbers(k: int, temperature: float | Tensor, lmbda: float | Tensor) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    # Tensors may be learned, so their values are the op's concern, at the time of use.
    if not isinstance(temperature, Tensor) and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature!r}")
    if not isinstance(lmbda, Tensor) and not 0 <= lmbda <= 1:
        raise ValueError(f"lmbda must be from 0 to 1, got {lmbda!r}")


def _agreed_layer(wanted: str | None, stored: str | None) -> str:
    if wanted is not None and stored is not None and wanted != stored:
        raise ValueError(f"key_layer={wanted!r}, but the datastore's keys are of {stored!r}")
    return wanted or stored or "att"


def _check_datastore(model: nn.Module, key: KeyModule, datastore: Any) -> None:
    with evaluating(model), capture_hidden_states(model, key) as captured:
        logits = model(**trace_inputs(model)).logits
        width, vocab_size = captured.states(1).shape[-1], logits.shape[-1]
    dim = getattr(datastore, "dim", None)
    if dim is not None and dim != width:
        raise ValueError(f"the datastore's keys have dim={dim}, but {key} of this model {width}")
    stored = getattr(datastore, "vocab_size", None)
    if stored is not None and stored > vocab_size:
        raise ValueError(
            f"the datastore's tokens are of a vocabulary of {stored}, but the model's logits have "
            f"{vocab_size}: it was built with another tokenizer"
        )


def _kept_positions(keys: Tensor, logits: Tensor, keep: Any) -> Tensor:
    """The keys of the positions that have logits; keys read early still have all positions."""
    if keys.shape[1] == logits.shape[1]:
        return keys
    return keys[:, keep] if isinstance(keep, Tensor) else keys[:, -logits.shape[1] :]


def _seen(mask: Any, logits: Tensor, keep: Any) -> Tensor | None:
    """(B * L,) bool, False at padding; None where there is no plain mask to tell."""
    batch, length = logits.shape[:2]
    # A step of one token is never padding, and asking would wait for the device.
    if length == 1 or not isinstance(mask, Tensor) or mask.ndim != 2 or isinstance(keep, Tensor):
        return None
    if mask.shape[0] != batch or mask.shape[1] < length:
        return None
    return mask[:, -length:].bool().flatten().to(logits.device)


def _shifted_nll(log_p: Tensor, labels: Tensor) -> Tensor:
    targets = labels[:, 1:].to(log_p.device)
    length = log_p.shape[1] - 1  # with logits_to_keep, the last positions
    return nn.functional.nll_loss(
        log_p[:, :-1].flatten(0, 1),
        targets[:, targets.shape[1] - length :].flatten(),
        ignore_index=_IGNORED_LABEL,
    )
