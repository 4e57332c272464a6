"""The loss of a mixture, as the base model would compute it of logits of its own.

Log-probabilities are logits that are normalized already, so the base model's loss function takes
them: shifts, ignored labels, ``num_items_in_batch`` and a loss of the user's keep their meaning.
That the model's loss is this function of its logits is tried on a few tokens, not believed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from knnext.lm.kept_positions import ALL, Kept, kept_positions, taken
from knnext.lm.running import evaluating, quiet_transformers, trace_inputs

IGNORED_LABEL = -100
#: Of the trial's loss, relative: models may take theirs in half precision.
_TOLERANCE = 0.02


def mixture_loss(
    model: nn.Module, logits: Tensor, arguments: dict[str, Any], aux_loss: Tensor | None = None
) -> Tensor:
    """The model's loss () of other logits.

    Args:
        model: the base model; its ``loss_function`` is used where it has one.
        logits: (B, n, V), of the positions that ``logits_to_keep`` left.
        arguments: of the model's call, by name, with ``labels`` (B, L) among them, -100 where
            ignored. Position i is held against label i + 1.
        aux_loss: what the model's output has by that name: a router's loss, which the model adds.
    """
    labels: Tensor = arguments["labels"]
    named = inspect.signature(model.forward).parameters
    options = {name: value for name, value in arguments.items() if name not in named}
    options = {**options, "shift_labels": arguments.get("shift_labels")}
    kept = kept_positions(model, arguments)
    if kept is not ALL or options["shift_labels"] is not None:
        options["shift_labels"] = _kept_targets(logits, labels, options["shift_labels"], kept)
    else:
        del options["shift_labels"]
    function = getattr(model, "loss_function", None) or _mean_nll
    loss: Tensor = function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
    if aux_loss is not None:
        config = getattr(model, "config", None)
        share = getattr(model, "router_aux_loss_coef", getattr(config, "router_aux_loss_coef", 0))
        loss = loss + share * aux_loss.to(loss.device)
    return loss


def _kept_targets(logits: Tensor, labels: Tensor, shifted: Tensor | None, kept: Kept) -> Tensor:
    """(B, n): the label after each position that has logits; ``shifted`` are all, or these."""
    if shifted is None:
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    elif shifted.shape[1] != labels.shape[1] and shifted.shape[1] == logits.shape[1]:
        return shifted
    return taken(shifted, kept).contiguous()


def _mean_nll(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **_: Any,
) -> Tensor:
    """For models without a loss function by name: what transformers has for causal LMs."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    loss = nn.functional.cross_entropy(
        logits.float().reshape(-1, vocab_size),
        shift_labels.reshape(-1).to(logits.device),
        ignore_index=IGNORED_LABEL,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def loss_trouble(model: nn.Module) -> str | None:
    """Why ``mixture_loss`` is not this model's loss of its logits; None where it is.

    A model that takes no labels has no loss to differ from.
    """
    if "labels" not in inspect.signature(model.forward).parameters:
        return None
    inputs = trace_inputs(model)
    arguments = {**inputs, "labels": inputs["input_ids"]}
    advice = "call the KNNLM without labels and compute the loss from its logits"
    with evaluating(model), quiet_transformers():  # which names its default loss
        try:
            output = model(**arguments)
        except Exception as error:  # GIT, for one, takes its first labels for those of an image
            text = f"{type(model).__name__} fails on labels of a few tokens alone: {error}"
            return f"{text}; {advice}"
        own = getattr(output, "loss", None)
        if own is None:
            return None
        ours = mixture_loss(model, output.logits, arguments, getattr(output, "aux_loss", None))
    if torch.isclose(own.float(), ours.float(), rtol=_TOLERANCE, equal_nan=True):
        return None
    return (
        f"{type(model).__name__} computes its loss in a way of its own ({own.item():.4g} on a few "
        f"tokens, where the mean nll of the next token is {ours.item():.4g}): {advice}"
    )
