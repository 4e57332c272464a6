"""A log with one row per token, for looking at where neighbors help and where they do not."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from knnext.errors import missing_package
from knnext.evaluation.scores import StreamScores, mix_log_probs
from knnext.output import whole_file

_CHUNK = 65_536
_COLUMNS = ("position", "document", "token", "log_p_lm", "log_p_knn", "log_p")


def write_token_log(
    scores: StreamScores,
    path: str | Path,
    temperature: float,
    lmbda: float,
    columns: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write position, document, token id, log p_lm, log p_knn and log p of every target.

    `columns` are joined to them by name: (n,) tensors, written as floats.

    The ending of `path` says how: `.parquet` (needs pyarrow) or `.jsonl`. `position` is that of
    the target in the token stream, `document` the document's name, or its number where it has no
    name. Where no neighbor stands for the target, log p_knn is -inf in parquet and null in JSON,
    which knows no infinity.
    """
    path = check_token_log(path)
    columns = columns or {}
    _check_columns(columns, scores.num_tokens)
    log_p_knn = scores.log_p_knn(temperature)
    log_p = mix_log_probs(scores.log_p_lm.double(), log_p_knn, lmbda, scores.has_neighbors)
    chunks = _chunks(scores, log_p_knn, log_p, columns)
    with whole_file(path) as part:
        if path.suffix == ".parquet":
            _write_parquet(part, chunks, list(columns))
        else:
            _write_jsonl(part, chunks)
    return path


def check_token_log(path: str | Path) -> Path:
    """The path, where a log can be written to it: its ending is known, and pyarrow is there."""
    path = Path(path)
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"a token log must end in .parquet or .jsonl, got {path.name!r}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        what = "a .parquet log (a .jsonl log does not) needs"
        raise missing_package(what, "pyarrow", "lm")
    return path


def _check_columns(columns: Mapping[str, Tensor], count: int) -> None:
    for name, values in columns.items():
        if name in _COLUMNS:
            raise ValueError(f"columns must not be named {', '.join(_COLUMNS)}, got {name!r}")
        if values.shape != (count,):
            raise ValueError(
                f"columns must hold one value a target, ({count},); {name!r} is "
                f"{tuple(values.shape)}"
            )


def _chunks(
    scores: StreamScores, log_p_knn: Tensor, log_p: Tensor, more: Mapping[str, Tensor]
) -> Iterator[dict[str, Any]]:
    names = scores.document_names
    for start in range(0, scores.num_tokens, _CHUNK):
        rows = slice(start, min(start + _CHUNK, scores.num_tokens))
        ids = scores.document_ids[rows].tolist()
        columns: tuple[Any, ...] = (
            _places(scores, rows),
            [names[i] if i < len(names) else str(i) for i in ids],
            scores.targets[rows].tolist(),
            scores.log_p_lm[rows].tolist(),
            log_p_knn[rows].tolist(),
            log_p[rows].tolist(),
        )
        joined = {name: values[rows].double().tolist() for name, values in more.items()}
        yield {**dict(zip(_COLUMNS, columns, strict=True)), **joined}


def _places(scores: StreamScores, rows: slice) -> list[int]:
    if scores.positions is None:
        return list(range(rows.start + 1, rows.stop + 1))
    return scores.positions[rows].tolist()


def _write_jsonl(path: Path, chunks: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for chunk in chunks:
            for row in zip(*chunk.values(), strict=True):
                finite = (None if _infinite(value) else value for value in row)
                file.write(json.dumps(dict(zip(chunk, finite, strict=True))) + "\n")


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _write_parquet(path: Path, chunks: Iterator[dict[str, Any]], more: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("position", pa.int64()),
            ("document", pa.string()),
            ("token", pa.int64()),
            ("log_p_lm", pa.float32()),
            ("log_p_knn", pa.float64()),
            ("log_p", pa.float64()),
            *((name, pa.float64()) for name in more),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for chunk in chunks:
            writer.write_table(pa.table(chunk, schema=schema))
