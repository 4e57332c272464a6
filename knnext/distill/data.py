"""Distillation data for torch: windows of tokens with the sparse targets of each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from knnext.datastore.errors import CorruptDatastoreError, UnfinishedDatastoreError
from knnext.distill.plan import PLAN_FILE, read_plan, shard_name
from knnext.distill.sparse import GROUP_ROWS, pyarrow, schema
from knnext.index.queries import check_count

_GROUPS = 4  # of decoded rows that are kept, for windows that are read in order


class DistillationData(Dataset[dict[str, Tensor]]):
    """Windows of consecutive tokens of what `distill` wrote, for `torch.utils.data.DataLoader`.

    Item i is a dict of tensors over L <= ``block_size`` tokens::

        input_ids (L,) int64    the token before each
        labels    (L,) int64    the token itself
        documents (L,) int64    which document it is of; a window may go over several
        ids       (L, top) int64, p (L, top) float32, tail (L,) float32   p_knn: `sparse_kl`
        log_p_lm, log_p_knn (L,) float32   of the token, by the base model and by the neighbors

    so that ``model(input_ids).logits`` is compared with the targets place by place. Windows are cut
    in groups of 4,096 rows, and the last of a group may be shorter: take a ``block_size`` that
    divides 4,096, or `collate`, which fills up. Files are read when they are needed, a group at a
    time; with worker processes each opens its own.

    Args:
        folder: with `distill.json`; a UnfinishedDatastoreError where shards are missing.
        block_size: tokens of a window, at most 4,096.

    Attributes:
        plan: what `distill.json` says: temperature, k, top, vocab_size and more.
    """

    def __init__(self, folder: str | Path, block_size: int = 512) -> None:
        pyarrow()
        # Files are opened later, wherever the program has gone by then.
        self.folder, self.plan = Path(folder).absolute(), read_plan(Path(folder))
        self.block_size = check_count("block_size", block_size)
        if block_size > GROUP_ROWS:
            raise ValueError(f"block_size must be at most {GROUP_ROWS}, got {block_size}")
        missing = [n for n in range(len(self.plan["shards"])) if not self._path(n).is_file()]
        if missing:
            raise UnfinishedDatastoreError(
                f"{folder}: {len(missing)} of {len(self.plan['shards'])} shards are missing; the "
                "same `knnext distill` goes on with them"
            )
        groups = [
            (shard, group, min(GROUP_ROWS, rows - group * GROUP_ROWS))
            for shard, rows in enumerate(self.plan["shards"])
            for group in range(-(-rows // GROUP_ROWS))
        ]
        self._groups = groups
        windows = [-(-rows // block_size) for _, _, rows in groups]
        self._firsts = np.cumsum([0, *windows])
        self._files: dict[int, Any] = {}
        self._held: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        return int(self.plan["tokens"])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if not -len(self) <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        item %= len(self)
        group = int(np.searchsorted(self._firsts, item, side="right")) - 1
        begin = (item - int(self._firsts[group])) * self.block_size
        rows = slice(begin, begin + self.block_size)
        return {name: column[rows].clone() for name, column in self._group(group).items()}

    def __getstate__(self) -> dict[str, Any]:
        """Without files and what was read of them."""
        return {**self.__dict__, "_files": {}, "_held": OrderedDict()}

    def teacher_nll(self, lmbda: float) -> float:
        """Mean nats a token of the kNN-LM that the data is of, at a weight of the neighbors.

        (1 - lmbda) p_lm + lmbda p_knn, and where a token has no neighbor p_lm alone, as in
        `evaluate`; of all tokens, with the probabilities before anything was left out.
        """
        from knnext.evaluation.scores import mix_log_probs

        total = 0.0
        for number in range(len(self._groups)):
            rows = self._group(number)
            log_p = (rows["log_p_lm"].double(), rows["log_p_knn"].double())
            total -= float(mix_log_probs(*log_p, lmbda, (rows["ids"] >= 0).any(1)).sum())
        return total / max(1, self.num_tokens)

    def _path(self, shard: int) -> Path:
        return self.folder / shard_name(shard)

    def _group(self, number: int) -> dict[str, Tensor]:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        shard, group, count = self._groups[number]
        path, file = self._path(shard), self._file(shard)
        with _whole(path):
            table = file.read_row_group(group)
        found = self._tensors(table, count, path)
        self._held[number] = found
        if len(self._held) > _GROUPS:
            self._held.popitem(last=False)
        return found

    def _file(self, shard: int) -> Any:
        if shard not in self._files:
            _, parquet = pyarrow()
            path, rows = self._path(shard), self.plan["shards"][shard]
            with _whole(path):
                file = parquet.ParquetFile(path, page_checksum_verification=True)
            found = (file.metadata.num_rows, file.num_row_groups)
            if found != (rows, -(-rows // GROUP_ROWS)) or not file.schema_arrow.equals(schema()):
                raise CorruptDatastoreError(
                    f"{path}: is not the shard that {PLAN_FILE} speaks of "
                    f"({rows:,} tokens in groups of {GROUP_ROWS:,}; it has {found[0]:,} rows in "
                    f"{found[1]:,} groups)"
                )
            self._files[shard] = file
        return self._files[shard]

    def _tensors(self, table: Any, count: int, path: Path) -> dict[str, Tensor]:
        def column(name: str) -> Any:
            return table.column(name).combine_chunks()

        if table.num_rows != count:
            raise CorruptDatastoreError(f"{path}: a row group has {table.num_rows} rows")
        names = {"previous": "input_ids", "token": "labels", "document": "documents"}
        found = {
            new: torch.from_numpy(column(old).to_numpy().astype(np.int64))
            for old, new in names.items()
        }
        for name in ("tail", "log_p_lm", "log_p_knn"):
            found[name] = torch.from_numpy(column(name).to_numpy().astype(np.float32))
        lists = column("ids")
        counts = np.diff(lists.offsets.to_numpy())
        there = np.arange(self.plan["top"]) < counts[:, None]
        ids = np.full((count, self.plan["top"]), -1, dtype=np.int64)
        p = np.zeros((count, self.plan["top"]), dtype=np.float32)
        ids[there], p[there] = lists.flatten().to_numpy(), column("p").flatten().to_numpy()
        return {**found, "ids": torch.from_numpy(ids), "p": torch.from_numpy(p)}


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Within, what Arrow says of a file that is not as it was written is a CorruptDatastoreError.

    A page's checksum is an OSError there, without a number as those of the disk have; what stands
    in the foot of a file, which has none, can be any other.
    """
    arrow, _ = pyarrow()
    try:
        yield
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptDatastoreError(f"{path}: cannot be read: {error}", [str(path)]) from error


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Items in one batch (B, L, ...), shorter ones filled up; ``mask`` (B, L) bool says what is.

    What fills up has input 0, label -100 (which torch's losses pass over), no kept token and
    tail 1, so that its `sparse_kl` is 0.
    """
    fill = {"labels": -100, "documents": -1, "ids": -1, "tail": 1}
    most = max(len(item["labels"]) for item in items)
    batch = {
        name: torch.stack([_filled(item[name], most, fill.get(name, 0)) for item in items])
        for name in items[0]
    }
    return {**batch, "mask": batch["labels"] != -100}


def _filled(tensor: Tensor, most: int, value: int) -> Tensor:
    rest = tensor.new_full((most - len(tensor), *tensor.shape[1:]), value)
    return torch.cat([tensor, rest])
