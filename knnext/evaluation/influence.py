"""Which documents moved each token of a continuation, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from knnext.datastore import Datastore
    from knnext.index.base import Index

#: Documents named for one token.
_MOST_DOCUMENTS = 3


@dataclass(frozen=True)
class Influence:
    """One token: its probability by the base LM, the neighbors and the mixture.

    ``documents``: those whose rows gave the token its p_knn, and how much of it, in descending
    order; [] where no neighbor has the token. ``base_token``: what the base LM holds likeliest in
    this place. ``row``: the nearest neighbor that has the token, or -1.
    """

    p_lm: float
    p_knn: float
    p: float
    documents: list[tuple[str, float]]
    base_token: int
    row: int


def influences(
    model: Any,
    index: Index,
    store: Datastore,
    ids: list[int],
    first: int,
    *,
    k: int,
    temperature: float,
    lmbda: float,
) -> list[Influence]:
    """Of the tokens ``ids[first:]``, each as it stood after those before it: one forward pass."""
    if first == len(ids):
        return []
    log_p, queries = _states(model, ids, first, store)
    distances, rows = index.search(queries, k)
    tokens = index.tokens(rows).cpu()
    distances, rows = distances.cpu(), rows.cpu()
    found = []
    for i, token in enumerate(ids[first:]):
        there = rows[i] >= 0
        weights = (-distances[i][there] / temperature).softmax(0)
        votes = tokens[i][there] == token
        p_lm, p_knn = float(log_p[i, token].exp()), float(weights[votes].sum())
        # Where nothing was found, the mixture is the LM alone.
        p = (1 - lmbda) * p_lm + lmbda * p_knn if bool(there.any()) else p_lm
        voting = rows[i][there][votes]  # nearest first
        documents = _by_document(store, voting, weights[votes])
        row = int(voting[0]) if len(voting) else -1
        found.append(Influence(p_lm, p_knn, p, documents, int(log_p[i].argmax()), row))
    return found


def _states(model: Any, ids: list[int], first: int, store: Datastore) -> tuple[Tensor, Tensor]:
    """(m, V) log p_lm on the CPU and (m, D) queries of the positions before the m new tokens."""
    import inspect

    import torch

    from knnext.lm.key_layer import capture_hidden_states
    from knnext.lm.running import evaluating

    count = len(ids) - first
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": count} if known else {}
    with evaluating(model), capture_hidden_states(model, store.key_layer or "att") as captured:
        read = torch.tensor([ids[:-1]], dtype=torch.int64, device=model.device)
        logits = model(input_ids=read, **keep).logits[0, -count:]
        states = captured.states(1)[0, -count:].to(store.dtype)
    return logits.float().log_softmax(-1).cpu(), states


def _by_document(store: Datastore, rows: Tensor, weights: Tensor) -> list[tuple[str, float]]:
    if store.num_documents == 0 or rows.numel() == 0:
        return []
    import torch

    documents, places = store.document_of(rows).unique(return_inverse=True)
    sums = torch.zeros(len(documents), dtype=torch.float32, device="cpu")
    sums.index_add_(0, places, weights.float())
    best = sums.sort(descending=True, stable=True).indices[:_MOST_DOCUMENTS]
    names = store.document_names
    return [(names[int(documents[j])], float(sums[j])) for j in best.tolist()]
