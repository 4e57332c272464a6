"""What one pass over a text leaves behind: enough to evaluate any temperature and lmbda at once.

The language model and the search are the expensive parts, and neither depends on temperature or
lmbda. Their results for every token of a text are kept here, and as an `.npz` file. What has k
entries a token lies in memory or in a file as suits its size, and is gone through piece by piece.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnext.evaluation.spill import empty_rows, release, row_pieces
from knnext.index.queries import check_k
from knnext.ops import knn_target_log_prob
from knnext.output import whole_file

FORMAT_VERSION = 1
_TENSORS = ("log_p_lm", "targets", "document_ids", "ends_document", "distances", "tokens")
_COUNTS = ("num_words", "num_bytes")
_OPTIONAL = ("indices", "positions")


@dataclass
class StreamScores:
    """Scores of n consecutive targets of a token stream.

    Attributes:
        log_p_lm: (n,) float32, the base model's log-probability of each target.
        targets: (n,) int64 token ids; position i of the stream has token i + 1 as its target.
        positions: (n,) int64, where in the stream each target stands; None: at 1, 2, ..., n.
        document_ids: (n,) int64, the document that position i belongs to.
        ends_document: (n,) bool, whether the target is the mark between two documents.
        distances: (n, k) float32, smaller is nearer, +inf is padding.
        tokens: (n, k) int32, -1 is padding.
        indices: (n, k) int64 rows of the datastore, or None where they were not kept.
        document_names: one name a document.
        num_words: (documents,) int64 words of each document's text.
        words: what was counted as a word, see `knnext.corpus.tokenized.WORDS`.
        num_bytes: (documents,) int64 bytes of each document's text in UTF-8.
        seconds: time spent in each part: `"lm"`, `"search"`.
    """

    log_p_lm: Tensor
    targets: Tensor
    document_ids: Tensor
    ends_document: Tensor
    distances: Tensor
    tokens: Tensor
    indices: Tensor | None = None
    document_names: Sequence[str] = ()
    num_words: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.int64, device="cpu")
    )
    num_bytes: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.int64, device="cpu")
    )
    seconds: dict[str, float] = field(default_factory=dict)
    positions: Tensor | None = None
    words: str = "marks"

    def __post_init__(self) -> None:
        count = self.num_tokens
        for name in _TENSORS[1:]:
            if getattr(self, name).shape[0] != count:
                raise ValueError(
                    f"{name} must have {count} rows like log_p_lm, "
                    f"got {tuple(getattr(self, name).shape)}"
                )
        if self.distances.shape != self.tokens.shape:
            raise ValueError(
                f"distances and tokens must have one shape, got {tuple(self.distances.shape)} and "
                f"{tuple(self.tokens.shape)}"
            )

    @property
    def num_tokens(self) -> int:
        """Targets scored, n."""
        return self.log_p_lm.shape[0]

    @property
    def k(self) -> int:
        """Neighbors per token."""
        return self.distances.shape[1]

    @property
    def has_neighbors(self) -> Tensor:
        """(n,) bool: rows that are not all padding."""
        return self._by_rows(lambda rows: (self.tokens[rows] >= 0).any(1))

    @property
    def target_found(self) -> Tensor:
        """(n,) bool: whether any neighbor stands for the target."""
        return self._by_rows(lambda rows: (self.tokens[rows] == self.targets[rows, None]).any(1))

    def truncate(self, k: int) -> StreamScores:
        """The same scores with the nearest k neighbors only; nothing is copied."""
        if not check_k(k) <= self.k:
            raise ValueError(f"k must be from 1 to the {self.k} neighbors stored, got {k}")
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("distances", "tokens", "indices"):
            if parts[name] is not None:
                parts[name] = parts[name][:, :k]
        return StreamScores(**parts)

    def log_p_knn(self, temperature: float) -> Tensor:
        """(n,) float64 log p_knn(target); -inf where no neighbor stands for the target."""
        temperature = float(temperature)
        return self._by_rows(
            lambda rows: knn_target_log_prob(
                self.distances[rows], self.tokens[rows], self.targets[rows], temperature
            ).double()
        )

    def _by_rows(self, function: Callable[[slice], Tensor]) -> Tensor:
        """What a function of a run of rows gives for all of them, in bounded memory."""
        parts = []
        for rows in row_pieces(self.num_tokens, 8 * self.k):
            parts.append(function(rows))
            release(self.distances, self.tokens)
        return torch.cat(parts) if parts else function(slice(0, 0))

    def log_p(self, temperature: float, lmbda: float) -> Tensor:
        """(n,) float64 log-probability of each target under the mixture."""
        return mix_log_probs(
            self.log_p_lm.double(), self.log_p_knn(temperature), lmbda, self.has_neighbors
        )

    def save(self, path: str | Path) -> None:
        """Write an `.npz` without pickled objects; it appears under its name when whole."""
        there = (name for name in _OPTIONAL if getattr(self, name) is not None)
        names = [*_TENSORS, *_COUNTS, *there]
        header = {
            "format_version": FORMAT_VERSION,
            "document_names": list(self.document_names),
            "seconds": self.seconds,
            "words": self.words,
        }
        written = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
        with whole_file(path) as part, zipfile.ZipFile(part, "w") as archive:
            for name in names:
                _write_array(archive, name, getattr(self, name))
            _write_array(archive, "header", written)

    @classmethod
    def load(cls, path: str | Path) -> StreamScores:
        """Read what `save` wrote. ValueError for any other file; nothing is unpickled."""
        try:
            with zipfile.ZipFile(path) as archive:
                found: dict[str, Any] = {
                    name.removesuffix(".npy"): _read_array(archive, name)
                    for name in archive.namelist()
                }
            header = json.loads(found.pop("header").numpy().tobytes())
            version = header["format_version"]
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} does not hold scores saved by knnext: {error}") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this version of knnext reads "
                f"{FORMAT_VERSION}"
            )
        missing = [name for name in _TENSORS + _COUNTS if name not in found]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        said: dict[str, Any] = {n: header[n] for n in ("document_names", "seconds")}
        said["words"] = header.get("words", "marks")  # before, they were counted in one way only
        return cls(**found, **said)


def _write_array(archive: zipfile.ZipFile, name: str, tensor: Tensor) -> None:
    """As `np.savez` does, piece by piece."""
    array = tensor.numpy()
    header = np.lib.format.header_data_from_array_1_0(np.empty((0, *array.shape[1:]), array.dtype))
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": array.shape})
        for rows in row_pieces(len(array), array[:1].nbytes):
            file.write(np.ascontiguousarray(array[rows]).tobytes())
            release(tensor)


def _read_array(archive: zipfile.ZipFile, name: str) -> Tensor:
    """An array of numbers out of the archive, piece by piece; zipfile compares its checksum."""
    with archive.open(name) as file:
        np.lib.format.read_magic(file)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        size = math.prod(shape) * dtype.itemsize
        if by_columns or dtype.kind not in "biuf" or not 1 <= len(shape) <= 2:
            raise ValueError(f"{name} is no array of numbers as scores have them")
        if not size <= archive.getinfo(name).file_size - file.tell() <= size:
            raise ValueError(f"{name} does not hold the {size:,} bytes that it speaks of")
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        tensor = (
            empty_rows(*shape, kind)
            if len(shape) == 2
            else torch.empty(shape[0], dtype=kind, device="cpu")
        )
        array = tensor.numpy()
        for rows in row_pieces(len(array), array[:1].nbytes):
            part = array[rows]
            part[...] = np.frombuffer(file.read(part.nbytes) or b"", dtype).reshape(part.shape)
            release(tensor)
        file.read(1)  # the end, where the checksum is compared
    return tensor


def mix_log_probs(
    log_p_lm: Tensor, log_p_knn: Tensor, lmbda: float, has_neighbors: Tensor | None = None
) -> Tensor:
    """log((1 - lmbda) p_lm + lmbda p_knn) per token, in log space.

    Args:
        log_p_lm: (n,) log-probabilities of the base model.
        log_p_knn: (n,) log-probabilities of the neighbors, -inf allowed.
        lmbda: weight of p_knn in [0, 1]; 0 gives `log_p_lm` and 1 gives `log_p_knn`, bit by bit.
        has_neighbors: (n,) bool; a row without neighbors is left to the model alone.
    """
    check_lmbda(lmbda)
    if lmbda == 0:
        mixed = log_p_lm
    elif lmbda == 1:
        mixed = log_p_knn
    else:
        mixed = torch.logaddexp(log_p_lm + math.log1p(-lmbda), log_p_knn + math.log(lmbda))
    return mixed if has_neighbors is None else torch.where(has_neighbors, mixed, log_p_lm)


def check_lmbda(lmbda: float) -> None:
    """Refuse a weight outside [0, 1]."""
    if not 0 <= lmbda <= 1:
        raise ValueError(f"lmbda must lie in [0, 1], got {lmbda}")


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive and finite."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
