"""The kNN-LM as a model: log p = log((1 - lmbda) p_lm + lmbda p_knn), in forward and generate.

The base model is wrapped and never edited. For the length of a call it is lent
(knnext/lm/mixing.py): what reads its keys puts the mixture where its logits were, and its loss.
``generate`` is therefore the base model's own, with its caches, masks, beams and processors; when
the call ends, by a return or an error, the model is its own again. Other threads may call the same
model meanwhile, or other KNNLMs over it, and each gets its own answer.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from knnext.lm.agreement import (
    agreed_layer,
    check_datastore,
    check_index,
    checked_k,
    checked_numbers,
    key_module,
    reads_all_positions,
    states_of,
)
from knnext.lm.compiled import uncompiled
from knnext.lm.kept_positions import Kept, kept_positions, num_positions, taken
from knnext.lm.mixing import Call, lending
from knnext.lm.mixture_loss import loss_trouble, mixture_loss
from knnext.lm.not_offered import FACTS, no_continuous_batching, why_not
from knnext.lm.past_context import explained, num_asked, num_tokens
from knnext.lm.running import input_device
from knnext.lm.wrapped import plain_model
from knnext.ops import knn_interpolate

#: Ways of decoding that read, or may read, the logits of more than the last position.
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "use_mtp", "custom_generate")


class KNNLM(nn.Module):
    """A causal LM mixed with the neighbors of its hidden states.

    Args:
        model: a causal LM of transformers, in any float dtype or quantized, on any device or
            several. In peft's wrapper it is the LM with the adapter; what is compiled of it runs
            so where no key is read inside.
        index: anything with ``search(queries, k) -> (distances, indices)`` and
            ``tokens(indices)``. Its ``datastore``, where it has one, gives the queries' dtype and
            the key layer, and is checked against the model.
        k: neighbors for each position.
        temperature: above 0, divides the distances; a number or a tensor ().
        lmbda: weight of p_knn, from 0 to 1; a number or a tensor (). The number 0 searches nothing.
        key_layer: "att", "ffn" or "module:NAME:input|output"; by default the datastore's.

    ValueError where an argument is out of range, or the datastore was built from another layer,
    width or vocabulary than this model has. TypeError for what is no model or no index.
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
        check_index(index)
        if isinstance(model, KNNLM):
            raise TypeError("model is a KNNLM: give its base model, which is its .model")
        datastore = getattr(index, "datastore", None)
        self.model, self.index = model, index
        self.k = checked_k(k)
        self.temperature, self.lmbda = checked_numbers(temperature, lmbda)
        self.key_layer = agreed_layer(key_layer, getattr(datastore, "key_layer", None))
        self._dtype: torch.dtype | None = getattr(datastore, "dtype", None)
        base = plain_model(model)
        self._key = key_module(base, self.key_layer)
        self._vocab_size = check_datastore(base, self._key, datastore)
        with lending(base, self._key, None):
            self._loss_trouble = loss_trouble(base)
        #: Whether keys are read before the model drops the positions that get no logits.
        self._keys_of_all = reads_all_positions(base, self._key)

    @property
    def _base(self) -> nn.Module:
        """The model inside its wrappers: ``generate`` and hooks would pass those by."""
        return plain_model(self.model)

    # What transformers and evaluation harnesses ask of a model. Only what is named here is the base
    # model's: a method of its own that calls the model would give the base's answers in silence.

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
        return input_device(self._base)

    @property
    def dtype(self) -> torch.dtype:
        """That of the base model's weights; the mixture's logits are float32."""
        dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]
        return dtype

    @property
    def name_or_path(self) -> str:
        """Where the base model came from."""
        return str(getattr(self.model, "name_or_path", ""))

    @property
    def loss_type(self) -> str | None:
        """The base model's: a Trainer asks it whether labels are shifted when it counts them."""
        return getattr(self.model, "loss_type", None)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model's loss knows ``num_items_in_batch``."""
        accepts = getattr(self.model, "accepts_loss_kwargs", None)
        if accepts is not None:
            return bool(accepts)
        parameters = inspect.signature(self.model.forward).parameters.values()
        return any(p.kind is p.VAR_KEYWORD for p in parameters)

    def _get_name(self) -> str:
        """The base model's class: by it a Trainer that smooths labels knows that they shift."""
        return type(self._base).__name__

    def __repr__(self) -> str:
        """Torch's, under its own name."""
        return f"KNNLM({super().__repr__().partition('(')[2]}"

    # The base model's own refuse what must not be moved or cast: offloaded, dispatched, quantized.

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As of any module, if the base model lets itself be moved or cast so."""
        self._base.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """``to`` a GPU."""
        return self.to(
            torch.device("cuda", device) if isinstance(device, int) else device or "cuda"
        )

    def half(self) -> Self:
        """``to(torch.float16)``."""
        return self.to(torch.float16)

    def float(self) -> Self:
        """``to(torch.float32)``."""
        return self.to(torch.float32)

    def can_generate(self) -> bool:
        """Whether the base model has ``generate``."""
        can = getattr(self.model, "can_generate", None)
        return bool(can()) if can is not None else hasattr(self.model, "generate")

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """The base model's, where it has one."""
        tie = getattr(self.model, "tie_weights", None)
        if tie is not None:
            tie(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The base model's."""
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        """The base model's."""
        head: nn.Module | None = self.model.get_output_embeddings()  # type: ignore[operator]
        return head

    def compute_transition_scores(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base model's, which reads what ``generate`` returned and calls no model."""
        found: Tensor = self._base.compute_transition_scores(*args, **kwargs)  # type: ignore[operator]
        return found

    def __getattr__(self, name: str) -> Any:
        """How the base model is held; AttributeError that tells what to do for all else of it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("model")
            if name in FACTS and hasattr(base, name):
                return getattr(base, name)
            raise AttributeError(why_not(name, base)) from None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        searched: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's output with ``logits`` (B, L, V) float32, log p of the mixture.

        Positions that ``attention_mask`` (B, L) marks 0 are not searched and keep the LM's own
        log p; so do those that ``searched`` (B, L) bool, where given, marks False. ``labels``
        (B, L), -100 where ignored, give ``loss``: the mean nll of the mixture, shifted by one, or
        what the base model's ``loss_function`` makes of the mixture. ``logits_to_keep``, for
        models that know it (n for the last n, or positions), gives these only, and only they are
        searched. Other arguments go to the base model.
        """
        if searched is not None:
            self._check_searched(searched, input_ids, kwargs.get("inputs_embeds"))
        if isinstance(input_ids, Tensor) and input_ids.numel() == 0:
            return self._nothing(input_ids, labels, kwargs.get("return_dict"))
        if labels is not None:
            kwargs["labels"] = labels
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                msg="a KNNLM is no graph, since it searches: compile its base model's blocks, by "
                "load_lm(compile=True)"
            )
        base = self._base
        with explained(base, num_tokens(input_ids), 0), self._lent(searched=searched):
            return base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the base model, fed with the mixture: same arguments, same result.

        Only the last position of each sequence is searched, but where drafts are checked or a
        ``custom_generate`` may read more. With lmbda = 0 this is the base model.
        What is not given is taken from the model's ``generation_config``, and from transformers
        after it, as always there: sampling then keeps the 50 likeliest tokens unless ``top_k=0``
        is given, and a chat model's file may bring a temperature, a top_p or penalties.
        ValueError where the base model fails past its context, with the numbers, and for drafts by
        early exit, which do not reach the keys.
        """
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if isinstance(ids, Tensor) and ids.ndim == 2 and ids.numel() == 0:
            if ids.shape[0] == 0:
                return ids
            raise ValueError(f"generate needs a token to begin with, got {tuple(ids.shape)} ids")
        given, base = num_tokens(ids), self._base
        with explained(base, given, num_asked(base, given, kwargs)):
            if not isinstance(self.lmbda, Tensor) and self.lmbda == 0:
                with lending(base, self._key, None):
                    return base.generate(*args, **kwargs)  # type: ignore[operator]
            kwargs.setdefault("disable_compile", True)  # a search cannot be compiled into the model
            with self._lent(last_only=not self._is_assisted(kwargs)):
                return base.generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def attached(self, last_only: bool = False) -> Iterator[nn.Module]:
        """Inside the block the base model itself gives the mixture's log p as its logits.

        And, of labels, the mixture's loss. For code that insists on a transformers model.
        ``last_only`` cuts the logits down to the last position. Yields the base model. It is so
        in the thread (or asyncio task) that entered the block: others get the base model's own
        logits. Where such blocks are nested, the innermost counts. RuntimeError where the base
        model is asked for continuous batching inside, which runs in a thread of its own.
        """
        with no_continuous_batching(self._base), self._lent(last_only):
            yield self.model

    @contextmanager
    def _lent(self, last_only: bool = False, searched: Tensor | None = None) -> Iterator[None]:
        finish = partial(self._finish, last_only, searched)
        with uncompiled(self.model, self._key.module), lending(self._base, self._key, finish):
            yield

    def _is_assisted(self, given: dict[str, Any]) -> bool:
        """Whether ``generate`` may read more than the last position's logits."""

        def said(name: str) -> bool:
            configs = (given.get("generation_config"), self.generation_config)
            values = (given.get(name), *(getattr(config, name, None) for config in configs))
            return any(value is not None and value is not False for value in values)

        if said("assistant_early_exit"):
            raise ValueError(
                "assistant_early_exit drafts without the last blocks, where keys are read: give an "
                "assistant_model or prompt_lookup_num_tokens"
            )
        return any(map(said, _ASSISTED))

    def _check_searched(self, searched: Any, *inputs: Any) -> None:
        shape = next((tuple(x.shape[:2]) for x in inputs if isinstance(x, Tensor)), None)
        if not isinstance(searched, Tensor) or searched.dtype != torch.bool:
            given = getattr(searched, "dtype", type(searched).__name__)
        elif shape is not None and tuple(searched.shape) != shape:
            given = f"bool of {tuple(searched.shape)}"
        else:
            return
        raise ValueError(f"searched must be a bool tensor of the ids' shape {shape}, got {given}")

    def _nothing(self, ids: Tensor, labels: Tensor | None, return_dict: bool | None) -> Any:
        """The output of no tokens, on which the models themselves fail in reshapes."""
        from transformers.modeling_outputs import CausalLMOutput

        shape = (*ids.shape, self._vocab_size)
        logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        # A mean over nothing, as torch has it.
        loss = None if labels is None else logits.new_tensor(float("nan"))
        output = CausalLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    def _finish(self, last_only: bool, searched: Tensor | None, call: Call, output: Any) -> Any:
        """The base model's output with the mixture's logits, and loss where labels were given."""
        logits = self._mixture(output.logits, call, last_only, searched)
        if call.arguments.get("labels") is None:
            return _with(output, logits=logits)
        if last_only:
            raise ValueError("labels were given where only the last position has logits")
        if self._loss_trouble is not None:
            raise RuntimeError(self._loss_trouble)
        aux_loss = getattr(output, "aux_loss", None)
        loss = mixture_loss(self._base, logits, call.arguments, aux_loss)
        return _with(output, loss=loss, logits=logits)

    def _mixture(
        self, logits: Tensor, call: Call, last_only: bool, searched: Tensor | None
    ) -> Tensor:
        if last_only:
            logits = logits[:, -1:]
        if logits.numel() == 0 or (not isinstance(self.lmbda, Tensor) and self.lmbda == 0):
            return logits.float().log_softmax(dim=-1)
        kept = kept_positions(self._base, call.arguments)
        # Some blocks flatten their rows before the feed-forward; they are folded back here.
        states = states_of(call, self._key)
        keys = states.reshape(len(logits), -1, states.shape[-1]).to(logits.device)
        if last_only:
            keys = keys[:, -1:]
        elif self._keys_of_all:
            keys = taken(keys, kept)
        if keys.shape[1] != logits.shape[1]:
            raise RuntimeError(
                f"{self._key} has {keys.shape[1]} states for the {logits.shape[1]} positions that "
                "have logits"
            )
        rows, queries = logits.flatten(0, 1), keys.flatten(0, 1)
        # A step of generate is never padding, and asking would wait for the device.
        seen = None if last_only else _seen(call.arguments, kept)
        if searched is not None:
            wanted = taken(searched, kept)
            seen = wanted if seen is None else seen & wanted.to(seen.device)
        seen = None if seen is None else seen.flatten().to(logits.device)
        if seen is None or bool(seen.all()):
            mixed = self._mix_rows(rows, queries)
        else:
            mixed = rows.float().log_softmax(dim=-1)
            if bool(seen.any()):
                found = self._mix_rows(rows[seen], queries[seen])
                # In place where nobody will want gradients of it: these are the largest tensors.
                put = mixed.index_put if found.requires_grad or mixed.requires_grad else None
                mixed = (put or mixed.index_put_)((seen,), found)
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


def _seen(arguments: dict[str, Any], kept: Kept) -> Tensor | None:
    """(B, n) bool, False at padding; None where there is no plain mask to tell."""
    mask, length = arguments.get("attention_mask"), num_positions(arguments)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or length is None or length > mask.shape[1]:
        return None
    return taken(mask[:, mask.shape[1] - length :].bool(), kept)


def _with(output: Any, **changes: Any) -> Any:
    """The output with other fields, in the order that its class gives them."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **changes)
    for name, value in changes.items():
        setattr(output, name, value)
    return output
