"""What the datastore files of other kNN-LM programs are: raw arrays, whose shapes must be found.

Those programs write memory maps without a header, in spite of the name ``.npy``. Some name the
number of rows N and the width D in the file name; for the rest they follow from the file sizes,
where only one reading fits. Nothing is guessed: where two fit, an error lists them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from knnext.datastore.errors import DatastoreError

Array: TypeAlias = NDArray[Any]

_KEY_SUFFIX = "_keys.npy"
_SIZES_IN_NAME = re.compile(r".*_(\d+)_(\d+)")
_NPY_MAGIC = b"\x93NUMPY"
_KEY_DTYPES = {torch.float16: "<f2", torch.float32: "<f4"}
_VALUE_DTYPES = {torch.int16: "<i2", torch.int32: "<i4", torch.int64: "<i8"}
_SAMPLE = 4096
_LARGEST_VOCABULARY = 1 << 22


@dataclass(frozen=True)
class LegacyFiles:
    """Keys (rows, dim) and values (rows,), memory-mapped; ``format`` for the record."""

    format: str
    keys_path: Path
    values_path: Path
    keys: Array
    values: Array
    faiss_index: str | None

    @property
    def dim(self) -> int:
        return int(self.keys.shape[1])

    @property
    def key_dtype(self) -> torch.dtype:
        return torch.float16 if self.keys.itemsize == 2 else torch.float32


@dataclass(frozen=True)
class _Reading:
    """One way to read the two files."""

    rows: int
    dim: int
    key_dtype: torch.dtype
    value_dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"num_entries={self.rows}, dim={self.dim}, key_dtype={self.key_dtype}, "
            f"value_dtype={self.value_dtype}"
        )


def find_files(
    source: str | Path,
    *,
    num_entries: int | None = None,
    dim: int | None = None,
    key_dtype: torch.dtype | None = None,
    value_dtype: torch.dtype | None = None,
) -> LegacyFiles:
    """Find and map the files of ``source``: a folder, ``PREFIX`` or ``PREFIX_keys.npy``.

    The arguments say what is known; DatastoreError where they leave no reading, or several.
    """
    keys_path = _find_keys(Path(source))
    stem = keys_path.name.removesuffix(_KEY_SUFFIX)
    values_path = keys_path.with_name(f"{stem}_vals.npy")
    if not values_path.is_file():
        raise DatastoreError(f"{values_path}: the values beside {keys_path.name} are missing")
    named = _SIZES_IN_NAME.fullmatch(stem)
    index = next((path.name for path in sorted(keys_path.parent.glob("*index*"))), None)
    if _has_header(keys_path) and _has_header(values_path):
        keys, values = _load_npy(keys_path), _load_npy(values_path).reshape(-1)
        _check_arrays(keys_path, keys, values)
        return LegacyFiles("npy", keys_path, values_path, keys, values, index)
    if named is not None:
        num_entries, dim = num_entries or int(named[1]), dim or int(named[2])
    wanted = (num_entries, dim, key_dtype, value_dtype)
    reading = _only_reading(keys_path, values_path, wanted)
    keys = _map(keys_path, _KEY_DTYPES[reading.key_dtype], (reading.rows, reading.dim))
    values = _map(values_path, _VALUE_DTYPES[reading.value_dtype], (reading.rows,))
    kind = "knnlm" if named is None else "knn-transformers"
    return LegacyFiles(kind, keys_path, values_path, keys, values, index)


def _find_keys(source: Path) -> Path:
    if source.is_dir():
        found = sorted(source.glob(f"*{_KEY_SUFFIX}"))
        if len(found) != 1:
            raise DatastoreError(
                f"{source}: holds {len(found)} files *{_KEY_SUFFIX}, want one; name the file"
            )
        return found[0]
    path = source
    if not source.name.endswith(_KEY_SUFFIX):
        path = source.with_name(source.name + _KEY_SUFFIX)
    if not path.is_file():
        raise DatastoreError(f"{path}: no such file")
    return path


def _has_header(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_NPY_MAGIC)) == _NPY_MAGIC


def _load_npy(path: Path) -> Array:
    array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _check_arrays(path: Path, keys: Array, values: Array) -> None:
    if keys.ndim != 2 or keys.dtype.str not in _KEY_DTYPES.values():
        raise DatastoreError(f"{path}: got {keys.dtype} {keys.shape}, want float16 or 32 (N, D)")
    if values.dtype.str not in _VALUE_DTYPES.values() or len(values) != len(keys):
        raise DatastoreError(
            f"{path}: {len(keys)} keys, but values are {values.dtype} of {len(values)} rows"
        )


def _map(path: Path, dtype: str, shape: tuple[int, ...]) -> Array:
    if shape[0] == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", shape=shape)


def _only_reading(
    keys_path: Path, values_path: Path, wanted: tuple[Any, Any, Any, Any]
) -> _Reading:
    sizes = keys_path.stat().st_size, values_path.stat().st_size
    fitting = [reading for reading in _readings(*sizes) if _agrees(reading, wanted)]
    if len(fitting) > 1:
        fitting = [reading for reading in fitting if _plausible(reading, keys_path, values_path)]
    if len(fitting) == 1:
        return fitting[0]
    sized = f"{keys_path} has {sizes[0]:,} bytes, {values_path.name} {sizes[1]:,}"
    names = ("num_entries", "dim", "key_dtype", "value_dtype")
    known = dict(zip(names, wanted, strict=True))
    given = ", ".join(f"{name}={value}" for name, value in known.items() if value is not None)
    if not fitting:
        raise DatastoreError(
            f"{sized}: no array of floats and token ids fits{': ' * bool(given)}{given}"
        )
    missing = [name for name, value in known.items() if value is None]
    example = "; or ".join(map(str, fitting[:4]))
    raise DatastoreError(
        f"{sized}: {len(fitting)} readings fit, such as {example}. "
        f"Say which with {' or '.join(missing)}"
    )


def _readings(key_bytes: int, value_bytes: int) -> list[_Reading]:
    found = []
    for key_dtype, value_dtype in product(_KEY_DTYPES, _VALUE_DTYPES):
        rows, rest = divmod(value_bytes, value_dtype.itemsize)
        if rest or not rows or key_bytes % (rows * key_dtype.itemsize):
            continue
        dim = key_bytes // (rows * key_dtype.itemsize)
        if dim:
            found.append(_Reading(rows, dim, key_dtype, value_dtype))
    return found


def _agrees(reading: _Reading, wanted: tuple[Any, Any, Any, Any]) -> bool:
    stated = (reading.rows, reading.dim, reading.key_dtype, reading.value_dtype)
    return all(want in (None, have) for want, have in zip(wanted, stated, strict=True))


def _plausible(reading: _Reading, keys_path: Path, values_path: Path) -> bool:
    """Whether the first few thousand numbers can be activations and token ids."""
    keys = _sample(keys_path, _KEY_DTYPES[reading.key_dtype])
    if not np.isfinite(keys).all():
        return False  # floats read as halves soon give NaN
    ids = _sample(values_path, _VALUE_DTYPES[reading.value_dtype])
    if reading.value_dtype != torch.int64 and not ids[1::2].any():
        return False  # every second one is the zero half of a wider id
    if reading.value_dtype == torch.int16:
        return True  # ids that overflowed may be negative; the import says so
    return bool(((ids >= 0) & (ids < _LARGEST_VOCABULARY)).all())  # else: two ids read as one


def _sample(path: Path, dtype: str) -> Array:
    return np.fromfile(path, dtype, _SAMPLE)
