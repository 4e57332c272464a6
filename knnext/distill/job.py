"""Writing sparse p_knn for a whole text: shard by shard, each whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from knnext.datastore.claims import in_turn, take_all
from knnext.datastore.files import LOCK_FILE, WriterLock
from knnext.datastore.room import check_disk
from knnext.distill.own import Own
from knnext.distill.plan import (
    FORMAT_VERSION,
    GRID,
    begin,
    begun,
    cuts_of,
    describe,
    facts_of,
    shard_name,
)
from knnext.distill.sparse import ShardWriter, pyarrow, row_bytes, sparse_targets
from knnext.evaluation.pieces import Piece, Scored, model_pieces, settled
from knnext.evaluation.scores import check_temperature
from knnext.evaluation.stream import built_with, common_keys
from knnext.index.queries import check_count, check_k
from knnext.ops import knn_target_log_prob
from knnext.output import whole_file

if TYPE_CHECKING:
    from knnext.corpus import TokenizedDocuments
    from knnext.index.base import Index

_MIXED_BYTES = 64 << 20  # held at once where neighbors become targets
_NEIGHBOR_BYTES = 48  # of that, for one neighbor

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Distilled:
    """What lies in a folder of distillation data.

    Attributes:
        tokens: rows, one a target.
        shards: files.
        num_bytes: of the files.
        most_bytes: that the files could have had: `row_bytes` a token.
        excluded_documents: of the text that are in the datastore, and were left out of their own
            tokens' neighbors.
        copies: of these, those of which the datastore has further copies, which were not.
    """

    folder: Path
    tokens: int
    shards: int
    num_bytes: int
    most_bytes: int
    excluded_documents: int
    copies: int

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / max(1, self.tokens)


def distill(
    model: nn.Module,
    index: Index,
    tokenized: TokenizedDocuments,
    folder: str | Path,
    *,
    temperature: float,
    k: int = 1024,
    top: int = 64,
    exclude: Literal["document", "row", "none"] = "document",
    allow_overlap: bool = False,
    key_layer: str | None = None,
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    query_batch: int = 16_384,
    bos: int | Literal["as built"] | None = "as built",
    separate_documents: bool | Literal["as built"] = "as built",
    full_last_window: bool = False,
    shard_tokens: int = 1 << 18,
    rank: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Distilled:
    """Write the sparse p_knn of every token of a text into ``folder``.

    A call with the same arguments goes on where one was killed, and the files end with the same
    bytes: a shard is there whole or not at all, and is cut where a batch of windows ends. Several
    processes that call it for one folder divide the shards among them, each taking what nobody has
    taken, and all return when the last is there. Memory does not grow with the text, but for its
    tokens: at most ``query_batch`` states and their k neighbors are held.

    Args:
        model, tokenized: as in `search_stream`.
        key_layer, block_size, stride, batch_size, bos, separate_documents, full_last_window: as
            there; windows and batches that are not said are as the folder was begun.
        index: that searches the datastore; not one that several processes search together.
        temperature: of p_knn, positive.
        k: neighbors a token.
        top: likeliest tokens to keep; what the others have together is kept as one number.
        exclude: what of the datastore a token's neighbors must not be, where the text is in it:
            ``"document"``, the whole document that the token belongs to, or ``"row"``, the token
            itself. ``"none"``: the text is not in it.
        allow_overlap: go on where documents are in the datastore in another form, such as edited
            ones, which cannot be told to be a token's own; an OverlapError names them.
        query_batch: states per search.
        shard_tokens: of a file, about; what a kill can lose.
        rank: this process's number and how many there are, so that each begins elsewhere.
        progress: is called with the tokens that are done, and all.
        say: takes a line on the room that will be needed, before the work begins.

    Raises:
        ValueError: a bad argument; or hashes that are needed are not there.
        OverlapError: see ``allow_overlap``.
        IncompatibleDatastoreError: the folder was begun with something else; names what differs.
        DatastoreFullError: the disk has not the room; before anything is written.
        DatastoreLockedError: another process has taken what is left, and hangs.
    """
    check_temperature(temperature)
    k, top = check_k(k), check_count("top", top)
    shard_tokens, query_batch = (
        check_count("shard_tokens", shard_tokens),
        check_count("query_batch", query_batch),
    )
    pyarrow()  # what is missing is said before the model runs
    if getattr(index, "ranks", None) is not None:
        raise ValueError(
            "index: processes that distill search each for itself: give an ExactIndex or FaissIndex"
        )
    folder = Path(folder)
    store = index.datastore
    layer, dtype = common_keys({"": index}, key_layer)
    apart = bool(
        built_with({"": index}, "separate_documents")
        if separate_documents == "as built"
        else separate_documents
    )
    own = Own(store, tokenized, exclude, allow_overlap=allow_overlap)
    scored = Scored(tokenized, apart=apart)
    fixed = {
        "magic": "knnext-distillation",
        "format_version": FORMAT_VERSION,
        "tokens": len(scored),
        **facts_of(tokenized),
        "datastore": store.fingerprint,
        "search": describe(index),
        "model": _model_of(model, store),
        "key_layer": layer,
        "vocab_size": store.vocab_size,
        "temperature": float(temperature),
        "k": k,
        "top": min(top, k),
        "exclude": exclude,
    }
    bos = built_with({"": index}, "bos") if bos == "as built" else bos
    known: dict[str, Any] | None = begun(folder)
    while known is not None:
        grid = [
            known.get(name) if given is None else given
            for name, given in zip(GRID, (block_size, stride, batch_size), strict=True)
        ]
        windows = {
            **settled(model, grid[0], grid[1], grid[2]),
            "bos": bos,
            "separate_documents": apart,
            "full_last_window": full_last_window,
        }
        cuts = cuts_of(tokenized, windows, shard_tokens, scored)
        shards = [scored.row(b) - scored.row(a) for a, b in cuts]
        plan = {**fixed, **windows, "shards": shards}
        _check_room(folder, plan, say)
        known = begin(folder, plan, known)
    work = _Work(model, index, tokenized, own, scored, windows, layer, dtype, plan, query_batch)
    _write_shards(work, folder, cuts, progress or (lambda done, total: None), rank)
    files = [folder / shard_name(n) for n in range(len(cuts))]
    return Distilled(
        folder,
        len(scored),
        len(cuts),
        sum(file.stat().st_size for file in files),
        len(scored) * row_bytes(plan["top"]),
        own.documents,
        own.copies,
    )


def _model_of(model: nn.Module, store: Any) -> str:
    from knnext.lm.load import model_identity

    return model_identity(model, store.meta.model_revision)[1]


@dataclass(frozen=True)
class _Work:
    """What a shard is made with."""

    model: nn.Module
    index: Index
    tokenized: TokenizedDocuments
    own: Own
    scored: Scored
    windows: dict[str, Any]
    layer: str
    dtype: torch.dtype
    plan: dict[str, Any]
    query_batch: int

    def write(self, path: Path, first: int, last: int) -> None:
        """The file of the positions [first, last)."""
        with ShardWriter(path) as writer:
            for whole in model_pieces(
                self.model,
                self.tokenized,
                self.layer,
                self.dtype,
                self.windows,
                self.query_batch,
                (first, last),
            ):
                piece = self.scored.of(whole)
                if len(piece.targets):
                    self._write_piece(writer, piece)

    def _write_piece(self, writer: ShardWriter, piece: Piece) -> None:
        k, temperature = self.plan["k"], self.plan["temperature"]
        positions = self.scored.positions[piece.rows]
        places = positions.numpy().astype(np.int64)
        kept_out = self.own.filter(places)
        if kept_out is None:
            distances, indices = self.index.search(piece.queries, k)
        else:
            distances, indices = self.index.search(piece.queries, k, filter=kept_out)
        step = max(1, _MIXED_BYTES // (_NEIGHBOR_BYTES * distances.shape[1]))
        for first in range(0, len(positions), step):
            rows = slice(first, first + step)
            near, tokens = distances[rows].cpu(), self.index.tokens(indices[rows]).cpu()
            targets = piece.targets[rows].long()
            writer.add(
                sparse_targets(near, tokens, temperature, self.plan["top"]),
                **self._columns(places[rows]),
                token=targets.int(),
                log_p_lm=piece.log_p_lm[rows],
                log_p_knn=knn_target_log_prob(near, tokens, targets, temperature).float(),
            )

    def _columns(self, places: np.ndarray) -> dict[str, Tensor]:
        of = self.tokenized.document_of(places + 1)
        return {
            "position": torch.from_numpy(places + 1),
            "document": torch.from_numpy(of.astype(np.int32)),
            "previous": torch.from_numpy(self.tokenized.tokens[places].astype(np.int32)),
        }


def _missing(folder: Path, count: int) -> list[int]:
    return [n for n in range(count) if not (folder / shard_name(n)).is_file()]


def _check_room(folder: Path, plan: dict[str, Any], say: Callable[[str], None] | None) -> None:
    """Say what the missing shards may take, while nothing is written yet and less can be asked."""
    a_token, total = row_bytes(plan["top"]), plan["tokens"]
    left = sum(plan["shards"][n] for n in _missing(folder, len(plan["shards"])))
    if say is not None and left:
        say(
            f"{left:,} of {total:,} tokens to go, at most {a_token:,} bytes each before compression"
        )
    check_disk(
        folder, left * a_token, f"the targets of {left:,} tokens",
        "keep fewer tokens (top=, --top), or choose another disk",
    )  # fmt: skip


def _write_shards(
    work: _Work,
    folder: Path,
    cuts: list[tuple[int, int]],
    progress: Progress,
    rank: tuple[int, int],
) -> None:
    """Return when all shards are there, made here or by other processes."""
    counts, total = work.plan["shards"], work.plan["tokens"]

    def done(number: int) -> bool:
        return (folder / shard_name(number)).is_file()

    def tell() -> None:
        progress(total - sum(counts[n] for n in _missing(folder, len(cuts))), total)

    def make(number: int) -> None:
        name = shard_name(number)
        lock = WriterLock(folder, _lock_name(number))
        try:
            if done(number):
                return
            for left in folder.glob(f"{name}.*.part"):  # of one that was killed at it
                left.unlink(missing_ok=True)
            with whole_file(folder / name) as part:
                work.write(part, *cuts[number])
        finally:
            lock.release()
        tell()

    def state(number: int) -> object:
        found = []
        for part in folder.glob(f"{shard_name(number)}.*.part"):
            with suppress(FileNotFoundError):  # in its place meanwhile
                found.append((part.name, part.stat().st_size))
        return sorted(found)

    tell()
    turns = [number - 1 for number in in_turn(len(cuts), *rank)]
    take_all(turns, done, make, state, "file")
    for number in range(len(cuts)):  # nobody takes what is done
        (folder / _lock_name(number)).unlink(missing_ok=True)


def _lock_name(number: int) -> str:
    return f"{LOCK_FILE}-{number:05d}"
