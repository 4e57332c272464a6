"""The loss of a student on sparse targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_kl(logits: Tensor, ids: Tensor, p: Tensor, tail: Tensor) -> Tensor:
    r"""KL divergence of a student from sparse targets, in nats a token.

    With q = softmax(logits), the kept tokens i with probabilities p_i, and tail t = 1 - sum p_i of
    all others together, it is ::

        KL = sum_i p_i (log p_i - log q_i) + t (log t - log(1 - sum_i q_i))

    which is the divergence of the two distributions over the kept tokens and "any other": by the
    log-sum inequality (Cover and Thomas, Elements of Information Theory, 2nd edition, theorem
    2.7.1) never more than that over all tokens, and the same where the tail is empty. The gradient
    by the logit of a kept token is q_i - p_i, and by that of another q_v - t q_v / (1 - sum q_i).

    The tail's logarithm is taken over the other tokens' logits themselves, so nothing is lost where
    the student gives them little.

    Args:
        logits: (..., V) of the student, any float dtype; computed in float32, or float64.
        ids: (..., n) int64 or int32, the kept tokens; -1 where there are fewer. None twice.
        p: (..., n) their probabilities; 0 where ids is -1.
        tail: (...) what all others have.

    Returns:
        (...) float32, or float64 for such logits. 0 where a token had no neighbor (tail 1, nothing
        kept).

    Raises:
        ValueError: shapes that do not belong together; tokens that the logits have not, as of a
            student with another tokenizer (a GPU's own error, where they lie there).
    """
    size = logits.shape[-1]
    if ids.shape != p.shape or ids.shape[:-1] != logits.shape[:-1] or tail.shape != ids.shape[:-1]:
        raise ValueError(
            "logits, ids, p and tail must be (..., V), (..., n), (..., n) and (...), got "
            f"{tuple(logits.shape)}, {tuple(ids.shape)}, {tuple(p.shape)} and {tuple(tail.shape)}"
        )
    if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= size:
        raise ValueError(f"ids: got token {int(ids.max())}, and logits are of {size} tokens")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    there = ids >= 0
    places = ids.long().clamp_min(0)
    p, tail = torch.where(there, p, 0).to(wide.dtype), tail.to(wide.dtype)
    log_z = wide.logsumexp(-1)
    log_q = wide.gather(-1, places) - log_z[..., None]
    # xlogy: 0 log 0 is 0, with no gradient from there.
    kept = (torch.xlogy(p, p) - p * torch.where(there, log_q, 0)).sum(-1)
    # Of tokens that are not kept: a column more takes what has no place.
    marks = torch.zeros(*wide.shape[:-1], size + 1, dtype=torch.bool, device=wide.device)
    marks.scatter_(-1, torch.where(there, places, size), True)
    others = wide.masked_fill(marks[..., :size], -torch.inf)
    asked = (tail > 0) & ~marks[..., :size].all(-1)
    others = torch.where(asked[..., None], others, 0)  # no logarithm of nothing, nor a gradient
    log_rest = torch.where(asked, others.logsumexp(-1) - log_z, 0)
    return kept + torch.xlogy(tail, tail) - tail * log_rest


def mixture_kl(
    logits: Tensor, ids: Tensor, p: Tensor, tail: Tensor, base_logits: Tensor, lmbda: float
) -> Tensor:
    """The loss whose minimum is the kNN-LM itself: its mixture of base model and neighbors.

    It is ``lmbda KL(p_knn || q) + (1 - lmbda) KL(p_lm || q)``, which differs from
    ``KL((1 - lmbda) p_lm + lmbda p_knn || q)`` by what does not depend on q, so both have one
    minimum, at the mixture; the tail of p_knn is taken together as in `sparse_kl`. A token without
    a neighbor is left to the base model, as in every mixture here.

    Args:
        logits, ids, p, tail: as for `sparse_kl`.
        base_logits: (..., V) of the model that the datastore was built with, without gradient.
        lmbda: weight of p_knn, from 0 to 1.

    Returns:
        (...) nats a token.
    """
    if not 0 <= lmbda <= 1:
        raise ValueError(f"lmbda must lie in [0, 1], got {lmbda}")
    if base_logits.shape != logits.shape:
        raise ValueError(
            f"base_logits must be of the shape of logits, got {tuple(base_logits.shape)} and "
            f"{tuple(logits.shape)}"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = F.log_softmax(base_logits.detach().to(wide), -1)
    log_q = F.log_softmax(logits.to(wide), -1)
    p_lm = log_p.exp()
    # Of tokens that the base model rules out (a logit of -inf) nothing is asked.
    to_base = (p_lm * torch.where(p_lm > 0, log_p - log_q, 0)).sum(-1)
    weight = (ids >= 0).any(-1).to(wide) * lmbda
    return weight * sparse_kl(logits, ids, p, tail) + (1 - weight) * to_base
