"""Writing sparse p_knn for a whole text: shard by shard, each whole or not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from knnext.datastore.errors import DatastoreError, IncompatibleDatastoreError
from knnext.datastore.files import WriterLock
from knnext.datastore.room import check_disk
from knnext.distill.own import Own
from knnext.distill.sparse import ShardWriter, pyarrow, row_bytes, sparse_targets
from knnext.evaluation.scores import check_temperature
from knnext.evaluation.stream import Piece, Scored, built_with, common_keys, model_pieces, settled
from knnext.index.queries import check_count, check_k
from knnext.lm.hidden_states import batch_ends
from knnext.ops import knn_target_log_prob
from knnext.output import whole_file, write_json

if TYPE_CHECKING:
    from knnext.corpus import TokenizedDocuments
    from knnext.index.base import Index

PLAN_FILE = "distill.json"
FORMAT_VERSION = 1
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


def shard_name(number: int) -> str:
    return f"tokens-{number:05d}.parquet"


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
    shard_tokens: int = 1 << 18,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Distilled:
    """Write the sparse p_knn of every token of a text into ``folder``.

    A call with the same arguments goes on where one was killed, and the files end with the same
    bytes: a shard is there whole or not at all, and is cut where a batch of windows ends. Memory
    does not grow with the text, but for its tokens: at most ``query_batch`` states and their k
    neighbors are held.

    Args:
        model, tokenized, key_layer, block_size, stride, batch_size, bos, separate_documents: as in
            `search_stream`; windows and batches that are not said are as the folder was begun.
        index: that searches the datastore.
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
        progress: is called with the tokens that are done, and all.
        say: takes a line on the room that will be needed, before the work begins.

    Raises:
        ValueError: a bad argument; or hashes that are needed are not there.
        OverlapError: see ``allow_overlap``.
        IncompatibleDatastoreError: the folder was begun with something else; names what differs.
        DatastoreFullError: the disk has not the room; before anything is written.
        DatastoreLockedError: another process writes there.
    """
    check_temperature(temperature)
    k, top = check_k(k), check_count("top", top)
    shard_tokens, query_batch = (
        check_count("shard_tokens", shard_tokens),
        check_count("query_batch", query_batch),
    )
    pyarrow()  # what is missing is said before the model runs
    folder = Path(folder)
    store = index.datastore
    layer, dtype = common_keys({"": index}, key_layer)
    apart = bool(
        built_with({"": index}, "separate_documents")
        if separate_documents == "as built"
        else separate_documents
    )
    begun = _begun(folder)
    block_size, stride, batch_size = (
        begun.get(name) if given is None else given
        for name, given in zip(_GRID, (block_size, stride, batch_size), strict=True)
    )
    windows = {
        **settled(model, block_size, stride, batch_size),
        "bos": built_with({"": index}, "bos") if bos == "as built" else bos,
        "separate_documents": apart,
        "full_last_window": False,
    }
    own = Own(store, tokenized, exclude, allow_overlap=allow_overlap)
    scored = Scored(tokenized, apart=apart)
    cuts = _cuts(tokenized, windows, shard_tokens, scored)
    plan = {
        "magic": "knnext-distillation",
        "format_version": FORMAT_VERSION,
        "tokens": len(scored),
        "text": f"sha256:{hashlib.sha256(tokenized.tokens.tobytes()).hexdigest()}",
        "datastore": store.fingerprint,
        "search": _describe(index),
        "model": _model_of(model, store),
        "key_layer": layer,
        "vocab_size": store.vocab_size,
        "temperature": float(temperature),
        "k": k,
        "top": min(top, k),
        "exclude": exclude,
        **windows,
        "shards": [scored.row(b) - scored.row(a) for a, b in cuts],
    }
    _begin(folder, plan, begun)
    lock = WriterLock(folder)
    try:
        work = _Work(model, index, tokenized, own, scored, windows, layer, dtype, plan, query_batch)
        _write_shards(work, folder, cuts, progress or (lambda done, total: None), say)
    finally:
        lock.release()
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


_GRID = ("block_size", "stride", "batch_size")


def _begun(folder: Path) -> dict[str, Any]:
    """The plan of what is in a folder; nothing where there is none yet."""
    place = folder / PLAN_FILE
    if not place.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise DatastoreError(f"{folder}: is not empty, and holds no distillation data")
        return {}
    return read_plan(folder)


def read_plan(folder: Path) -> dict[str, Any]:
    """`distill.json` of a folder; DatastoreError where it is none."""
    place = folder / PLAN_FILE
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        version = (found["magic"], found["format_version"])
    except FileNotFoundError:
        raise DatastoreError(f"{folder}: holds no distillation data (no {PLAN_FILE})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DatastoreError(f"{place}: is not what `knnext distill` writes: {error}") from None
    if version != ("knnext-distillation", FORMAT_VERSION):
        raise DatastoreError(f"{place}: is {version}, this knnext reads version {FORMAT_VERSION}")
    return dict(found)


def _begin(folder: Path, plan: dict[str, Any], begun: dict[str, Any]) -> None:
    if not begun:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN_FILE, plan)
        return
    differ = [
        f"{name}: the data has {begun.get(name)!r}, asked for {value!r}"
        for name, value in plan.items()
        if begun.get(name) != value and name != "shards"
    ]
    if not differ and begun["shards"] != plan["shards"]:
        differ = ["shard_tokens: the data was cut at other tokens"]
    if differ:
        raise IncompatibleDatastoreError(f"{folder}: cannot go on with it: {'; '.join(differ)}")


def _cuts(
    tokenized: TokenizedDocuments, windows: dict[str, Any], size: int, scored: Scored
) -> list[tuple[int, int]]:
    """Positions [first, last) of each shard; cut where a batch ends, each with something scored."""
    apart = tokenized.document_offsets if windows["separate_documents"] else None
    grid = {name: int(windows[name]) for name in _GRID}
    ends = batch_ends(len(tokenized.tokens), **grid, separate_documents=apart).tolist()
    cuts, first = [], 0
    for end in ends:
        if scored.row(end) - scored.row(first) >= size or end == ends[-1]:
            cuts.append((first, end))
            first = end
    if len(cuts) > 1 and scored.row(cuts[-1][0]) == scored.row(cuts[-1][1]):
        (begin, _), (_, end) = cuts[-2:]
        cuts[-2:] = [(begin, end)]
    return cuts


def _describe(index: Index) -> str:
    """What decides which neighbors a search finds."""
    sidecar = getattr(index, "sidecar", None)
    if sidecar is None:
        return "exact"
    facts = [sidecar.recipe.factory, f"seed {sidecar.recipe.seed}", f"crc {sidecar.crc32}"]
    facts += [f"{name} {getattr(index, name, None)}" for name in ("nprobe", "rescore")]
    return "faiss, " + ", ".join(facts)


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
        for begin in range(0, len(positions), step):
            rows = slice(begin, begin + step)
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


def _write_shards(
    work: _Work,
    folder: Path,
    cuts: list[tuple[int, int]],
    progress: Progress,
    say: Callable[[str], None] | None,
) -> None:
    counts, total = work.plan["shards"], work.plan["tokens"]
    missing = [n for n in range(len(cuts)) if not (folder / shard_name(n)).is_file()]
    for left in folder.glob("*.part"):  # of a shard that a kill cut off
        left.unlink(missing_ok=True)
    a_token = row_bytes(work.plan["top"])
    left_tokens = sum(counts[n] for n in missing)
    if say is not None and missing:
        say(
            f"{left_tokens:,} of {total:,} tokens to go, at most {a_token:,} bytes each before "
            "compression"
        )
    check_disk(
        folder, left_tokens * a_token, f"the targets of {left_tokens:,} tokens",
        "keep fewer tokens (top=, --top), or choose another disk",
    )  # fmt: skip
    done = total - left_tokens
    progress(done, total)
    for number in missing:
        with whole_file(folder / shard_name(number)) as part:
            work.write(part, *cuts[number])
        done += counts[number]
        progress(done, total)
