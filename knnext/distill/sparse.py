"""From neighbors to sparse targets, and the parquet files that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knnext.errors import missing_package

#: Rows of a parquet row group: what a reader decodes for one window.
GROUP_ROWS = 4096
#: Of a row beside its kept tokens: position, document, previous, token, tail, log_p_lm, log_p_knn
#: and the place of its list.
_ROW_BYTES = 8 + 4 + 4 + 4 + 4 + 4 + 4 + 4
_KEPT_BYTES = 4 + 2


class Sparse(NamedTuple):
    """Of n tokens: (n, top) int32 `ids`, -1 where there are fewer, (n, top) float16 `p`, largest
    first, and (n,) float32 `tail`."""

    ids: Tensor
    p: Tensor
    tail: Tensor


def row_bytes(top: int) -> int:
    """Of one token on disk at most, before compression."""
    return _ROW_BYTES + top * _KEPT_BYTES


def sparse_targets(distances: Tensor, tokens: Tensor, temperature: float, top: int) -> Sparse:
    """p_knn of n tokens: softmax(-distance / temperature), summed by token, the `top` largest.

    Probabilities are summed in float64 and rounded to float16, and the tail is what these leave of
    1. Where they would be more than 1, they are rounded down; so what is stored sums to 1 in every
    row. Among equals the lower token comes first. A token without a neighbor keeps nothing and has
    tail 1.

    Args:
        distances: (n, k) float, smaller is nearer, +inf is padding.
        tokens: (n, k) int32, -1 is padding.
    """
    n, k = distances.shape
    weights = torch.where(tokens >= 0, -distances.double() / temperature, -torch.inf)
    weights = weights.softmax(1).nan_to_num_(0.0)  # a row of padding alone
    ordered, order = tokens.sort(dim=1, stable=True)
    weights = weights.gather(1, order)
    group = torch.zeros(n, k, dtype=torch.int64, device=tokens.device)
    group[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    sums = torch.zeros(n, k, dtype=torch.float64, device=tokens.device).scatter_add_(
        1, group, weights
    )
    names = torch.full((n, k), -1, dtype=torch.int32, device=tokens.device).scatter_(
        1, group, ordered.int()
    )
    # Stable, and groups ascend by token.
    sums, order = sums.sort(dim=1, descending=True, stable=True)
    ids, wanted = names.gather(1, order)[:, :top].contiguous(), sums[:, :top]
    p = wanted.to(torch.float16)
    p = torch.where(p.double().sum(1, keepdim=True) > 1, _rounded_down(wanted), p)
    ids.masked_fill_(p == 0, -1)
    return Sparse(ids, p, (1 - p.double().sum(1)).clamp_min(0).float())


def _rounded_down(p: Tensor) -> Tensor:
    """As float16, none above what it was; p in [0, 1]."""
    near = p.to(torch.float16)
    # Of what is not negative, the number before is the one whose bits are one less.
    below = (near.view(torch.int16) - 1).view(torch.float16)
    return torch.where(near.double() > p, below, near)


class ShardWriter:
    """Writes rows of one parquet file, in row groups of `GROUP_ROWS`."""

    def __init__(self, path: Path) -> None:
        arrow, parquet = pyarrow()
        self._arrow, self._schema = arrow, schema()
        few = ["document", "previous", "token"]
        # The sums of a checksum a page are there for whoever doubts a disk.
        self._writer = parquet.ParquetWriter(
            path,
            self._schema,
            compression="zstd",
            use_dictionary=few,
            write_page_checksum=True,
        )
        self._held: dict[str, list[Tensor]] = {}
        self._count = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None and self._count:
            self._write(self._count)
        self._writer.close()

    def add(self, sparse: Sparse, **columns: Tensor) -> None:
        """(n,) `columns` and the targets of n rows."""
        for name, tensor in {**columns, **sparse._asdict()}.items():
            self._held.setdefault(name, []).append(tensor)
        self._count += len(sparse.tail)
        while self._count >= GROUP_ROWS:
            self._write(GROUP_ROWS)

    def _write(self, count: int) -> None:
        rows = {name: torch.cat(parts) for name, parts in self._held.items()}
        self._held = {name: [tensor[count:]] for name, tensor in rows.items()}
        self._count -= count
        ids, p = rows.pop("ids")[:count], rows.pop("p")[:count]
        kept = ids >= 0
        places = torch.zeros(count + 1, dtype=torch.int32, device="cpu")
        places[1:] = kept.sum(1).cumsum(0)
        arrow, offsets = self._arrow, self._arrow.array(places.numpy())
        lists = {
            "ids": arrow.ListArray.from_arrays(offsets, arrow.array(ids[kept].numpy())),
            "p": arrow.ListArray.from_arrays(offsets, arrow.array(p[kept].numpy())),
        }
        table = {name: arrow.array(tensor[:count].numpy()) for name, tensor in rows.items()} | lists
        self._writer.write_table(
            arrow.table([table[name] for name in self._schema.names], schema=self._schema)
        )


def schema() -> Any:
    """Of the files: docs/distill.md says what each column is."""
    arrow, _ = pyarrow()
    return arrow.schema(
        [
            ("position", arrow.int64()),
            ("document", arrow.int32()),
            ("previous", arrow.int32()),
            ("token", arrow.int32()),
            ("log_p_lm", arrow.float32()),
            ("log_p_knn", arrow.float32()),
            ("tail", arrow.float32()),
            ("ids", arrow.list_(arrow.int32())),
            ("p", arrow.list_(arrow.float16())),
        ]
    )


def pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet; MissingPackageError where they are not there."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package("distillation data needs", "pyarrow", "lm") from error
    return arrow, parquet
