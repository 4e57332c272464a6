"""What is known of some positions: distances, tokens, and log p_lm of every token in question.

A browser mixes these at any temperature, lmbda and k by itself. The tokens in question of a
position, its candidates, are its target, its neighbors' tokens, and the base LM's likeliest.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from knnext.evaluation.scores import StreamScores
from knnext.evaluation.spans import decode_all
from knnext.ops import knn_interpolate

if TYPE_CHECKING:
    from knnext.index.base import Index

_LIKELIEST = 20
#: Rows sent along, whose text can be asked for.
_ROWS = 32
_NO_TOKEN = 0xFFFF


@dataclass(frozen=True)
class Figures:
    """n positions, on the CPU.

    Attributes:
        targets: (n,) int64.
        distances, tokens, rows: (n, k) float32, int32 and int64, as an index gives them.
        candidates: n tensors (c,) of int64 ids, ascending.
        log_p: n tensors (c,) float32, log p_lm of them.
    """

    targets: Tensor
    distances: Tensor
    tokens: Tensor
    rows: Tensor
    candidates: list[Tensor]
    log_p: list[Tensor]

    def join(self, others: Sequence[Figures]) -> Figures:
        """These and those after them."""
        all_of = [self, *others]
        names = ("targets", "distances", "tokens", "rows")
        joined = {name: torch.cat([getattr(one, name) for one in all_of]) for name in names}
        candidates = [ids for one in all_of for ids in one.candidates]
        return Figures(**joined, candidates=candidates, log_p=[p for o in all_of for p in o.log_p])

    @property
    def scores(self) -> StreamScores:
        """The same as `knnext.evaluation` has them, of one document."""
        count = len(self.targets)
        return StreamScores(
            log_p_lm=torch.stack([self.log_p[i][place] for i, place in enumerate(self._places())]),
            targets=self.targets,
            document_ids=torch.zeros(count, dtype=torch.int64, device="cpu"),
            ends_document=torch.zeros(count, dtype=torch.bool, device="cpu"),
            distances=self.distances,
            tokens=self.tokens,
            indices=self.rows,
            document_names=["your text"],
        )

    def _places(self) -> list[int]:
        """Where each target stands among its candidates."""
        pairs = zip(self.candidates, self.targets, strict=True)
        return [int(torch.searchsorted(ids, target)) for ids, target in pairs]

    def log_mixture(self, logits: Tensor, temperature: float, lmbda: float, k: int) -> Tensor:
        """(n, V) log p over the whole vocabulary, by the nearest k."""
        distances, tokens = self.distances[:, :k], self.tokens[:, :k]
        return knn_interpolate(
            logits.float().cpu(), distances.contiguous(), tokens.contiguous(), temperature, lmbda
        )

    def with_targets(self, targets: Tensor, logits: Tensor) -> Figures:
        """The same with other targets (n,), which become candidates."""
        candidates, log_p = _candidates(logits, targets, self.tokens)
        return replace(self, targets=targets, candidates=candidates, log_p=log_p)

    def plain(self, tokenizer: Any, texts: list[str], copied: Tensor) -> dict[str, Any]:
        """What passages.js reads; arrays as base64 of little-endian numbers."""
        counts = [len(ids) for ids in self.candidates]
        named, ids = torch.cat(self.candidates).unique(return_inverse=True)
        places = np.full(self.tokens.shape, _NO_TOKEN, dtype=np.uint16)
        for i, found in enumerate(self.candidates):
            kept = (self.tokens[i] >= 0).numpy()
            own = torch.searchsorted(found, self.tokens[i].long())
            places[i, kept] = own.numpy()[kept]
        rows = [[row for row in line if row >= 0] for line in self.rows[:, :_ROWS].tolist()]
        return {
            "k": self.distances.shape[1],
            "texts": texts,
            "copied": copied.tolist(),
            "vocab": decode_all(tokenizer, [[token] for token in named.tolist()]),
            "rows": rows,
            "distances": _packed(self.distances.numpy(), "<f4"),
            "places": _packed(places, "<u2"),
            "starts": _packed(np.cumsum([0, *counts]), "<i4"),
            "ids": _packed(ids.numpy(), "<i4"),
            "log_p": _packed(torch.cat(self.log_p).numpy(), "<f4"),
            "target_places": _packed(np.array(self._places()), "<u2"),
        }


def figures(index: Index, keys: Tensor, logits: Tensor, targets: Tensor | None, k: int) -> Figures:
    """Search (n, D) keys and keep what of (n, V) logits is in question.

    Without targets, those to come are set with `Figures.with_targets`.
    """
    distances, rows = index.search(keys, k)
    tokens = index.tokens(rows).cpu()
    wanted = logits.argmax(1) if targets is None else targets
    candidates, log_p = _candidates(logits, wanted.cpu(), tokens)
    return Figures(wanted.cpu().long(), distances.cpu(), tokens, rows.cpu(), candidates, log_p)


def _candidates(
    logits: Tensor, targets: Tensor, tokens: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each position the ids in question, ascending, and their log p_lm."""
    logits = logits.float().cpu()
    whole = logits.logsumexp(1)
    likeliest = logits.topk(min(_LIKELIEST, logits.shape[1]), dim=1).indices
    candidates, log_p = [], []
    for i, line in enumerate(tokens):
        ids = torch.cat([targets[i : i + 1].long(), likeliest[i], line[line >= 0].long()]).unique()
        candidates.append(ids)
        log_p.append(logits[i, ids] - whole[i])
    return candidates, log_p


def _packed(array: Any, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype=kind).tobytes()).decode("ascii")
