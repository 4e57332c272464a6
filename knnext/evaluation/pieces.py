"""What a model gives of a text's positions, piece by piece.

A piece is as many queries as are searched at once, with the tokens that come next and what the
model says of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from knnext.evaluation.spill import empty_rows, release
from knnext.progress import progress
from knnext.ranks import Ranks

if TYPE_CHECKING:
    from knnext.corpus import TokenizedDocuments
    from knnext.datastore import Datastore

PIECE_ROWS = 16_384


class Piece(NamedTuple):
    """Consecutive positions of a text, on the CPU: (n, D) queries, (n,) targets and log p_lm."""

    first: int
    queries: Tensor
    targets: Tensor
    log_p_lm: Tensor

    @classmethod
    def join(cls, first: int, parts: Sequence[tuple[Tensor, ...]]) -> Piece:
        """Of (queries, targets, log p_lm) triples."""
        queries, targets, log_p_lm = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(first, queries, targets, log_p_lm.float())

    @classmethod
    def empty(cls, store: Datastore) -> Piece:
        """Of no position."""
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        return cls(0, none.new_empty(0, store.dim, dtype=store.dtype), none, none.float())

    @property
    def rows(self) -> slice:
        """Where they stand among all positions."""
        return slice(self.first, self.first + len(self.targets))


def num_scored(tokenized: TokenizedDocuments) -> int:
    """Targets of a text; ValueError where it has none."""
    count = max(0, len(tokenized.tokens) - 1)
    if count == 0:
        raise ValueError("tokenized holds fewer than two tokens, there is nothing to score")
    return count


class Scored:
    """Which positions of a text are scored, and where each stands among these."""

    def __init__(self, tokenized: TokenizedDocuments, *, apart: bool) -> None:
        keep = torch.ones(num_scored(tokenized), dtype=torch.bool, device="cpu")
        self.keep = None if not apart else keep
        self._before = torch.arange(len(keep) + 1, device="cpu")
        if apart:
            offsets = torch.as_tensor(tokenized.document_offsets, dtype=torch.int64, device="cpu")
            marks = offsets[(offsets > 0) & (offsets <= len(keep))] - 1
            keep[marks] = False
            self._before[1:] = keep.cumsum(0)
            if not bool(keep.any()):
                raise ValueError("tokenized holds no document with a token, nothing can be scored")
        self.positions = keep.nonzero().squeeze(1)

    def __len__(self) -> int:
        return len(self.positions)

    def row(self, position: int) -> int:
        """How many are scored before it."""
        return int(self._before[position])

    def of(self, piece: Piece) -> Piece:
        """What of a piece is scored; `first` is then its row."""
        if self.keep is None:
            return piece
        kept = self.keep[piece.rows]
        columns = (piece.queries, piece.targets, piece.log_p_lm)
        return Piece(self.row(piece.first), *(column[kept] for column in columns))


def settled(
    model: nn.Module,
    block_size: int | None,
    stride: int | None,
    batch_size: int | None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Windows of an evaluation with what was not said: the same on every rank."""
    from knnext.lm.batching import choose_batch_size
    from knnext.lm.hidden_states import default_block_size
    from knnext.lm.windows import check_windows, half_stride

    block = default_block_size(model) if block_size is None else block_size
    step = half_stride(max(1, block)) if stride is None else stride
    check_windows(block, step)
    if batch_size is None:
        mine = choose_batch_size(model, block, logits=True)
        batch_size = min(size for (size,) in (ranks or Ranks()).gather([mine]))
    return {"block_size": block, "stride": step, "batch_size": batch_size}


def model_pieces(
    model: nn.Module,
    tokenized: TokenizedDocuments,
    key_layer: str,
    dtype: torch.dtype,
    windows: dict[str, Any],
    size: int,
    share: tuple[int, int] | None = None,
) -> Iterator[Piece]:
    """What the model gives of positions [first, last), or of all, in order, `size` a piece.

    A `share` begins and ends where a batch of windows does.
    """
    from knnext.lm.hidden_states import hidden_states

    first, last = share or (0, num_scored(tokenized))
    parts: list[tuple[Tensor, ...]] = []
    held = 0
    with progress(last - first, "scoring", unit="tokens") as bar:
        for batch in hidden_states(
            model,
            tokenized,
            key_layer=key_layer,
            dtype=dtype,
            with_log_p_lm=True,
            start=first,
            stop=last,
            **windows,
        ):
            assert batch.log_p_lm is not None  # asked for above
            begin = 0
            while begin < len(batch):
                rows = slice(begin, begin + size - held)
                columns = (batch.keys, batch.targets, batch.log_p_lm)
                parts.append(tuple(column[rows].cpu() for column in columns))
                begin, held = begin + len(parts[-1][1]), held + len(parts[-1][1])
                if held == size:
                    yield Piece.join(first, parts)
                    first, held, parts = first + held, 0, []
            bar.update(len(batch))
        if parts:
            yield Piece.join(first, parts)
    if first + held != last:
        raise RuntimeError(f"hidden_states gave positions to {first + held}, wanted to {last}")


def run_model(
    model: nn.Module,
    tokenized: TokenizedDocuments,
    key_layer: str,
    dtype: torch.dtype,
    windows: dict[str, Any],
    share: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, D) queries, (n,) targets and (n,) log p_lm of positions 0 to T - 2, on the CPU.

    Or of a `share` of them, [first, last), that begins and ends where a batch of windows does.
    """
    begin, end = share or (0, num_scored(tokenized))
    queries = torch.empty(0, 0, dtype=dtype, device="cpu")
    targets = torch.empty(end - begin, dtype=torch.int64, device="cpu")
    log_p_lm = torch.empty(end - begin, dtype=torch.float32, device="cpu")
    for piece in model_pieces(model, tokenized, key_layer, dtype, windows, PIECE_ROWS, share):
        rows = slice(piece.rows.start - begin, piece.rows.stop - begin)
        if not len(queries):
            queries = empty_rows(end - begin, piece.queries.shape[1], dtype)
        queries[rows] = piece.queries
        targets[rows], log_p_lm[rows] = piece.targets, piece.log_p_lm
        release(queries)
    return queries, targets, log_p_lm
