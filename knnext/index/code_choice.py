"""Which codes an exact search uses, and what is said about it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from knnext.errors import IndexMismatchError, KnnextWarning
from knnext.index.codes import StoredCodes, default_path
from knnext.index.codes_meta import HOW_TO_MAKE
from knnext.index.tensors import TensorStore, tensor_store
from knnext.ops import KeyCodes
from knnext.say import as_typed, binary_size

if TYPE_CHECKING:
    from knnext.datastore import Datastore

#: What `ExactIndex` takes: "auto", whether to use the stored codes, or codes.
Codes: TypeAlias = "bool | str | KeyCodes | StoredCodes"


class Choice(NamedTuple):
    """The codes to search by, or None; and whose they are, or why there are none."""

    codes: KeyCodes | StoredCodes | None
    why: str


def choose_codes(
    datastore: Datastore, codes: Codes, device: torch.device, *, verify: bool = True
) -> Choice:
    """See `ExactIndex` for what `codes` may be. "auto" warns of codes that cannot be used."""
    known = isinstance(codes, bool | KeyCodes | StoredCodes) or codes == "auto"
    if not known:
        raise TypeError(
            f'codes must be "auto", True, False, KeyCodes or StoredCodes, got {codes!r}'
        )
    if codes is False:
        return Choice(None, "codes=False")
    if device.type != "cpu":
        why = f"codes serve the CPU, and this is {device}"
        if codes != "auto":
            raise ValueError(f"codes: {why}; leave them out")
        return Choice(None, why)
    if isinstance(codes, KeyCodes):
        return _given(datastore, codes)
    tensors = tensor_store(datastore)
    if tensors is not None:
        return _of_tensors(tensors, codes)
    folder = codes.path if isinstance(codes, StoredCodes) else default_path(datastore)
    try:
        return Choice(StoredCodes.open(datastore, folder, verify=verify), folder.name)
    except FileNotFoundError as error:
        if codes != "auto":
            raise
        begun = folder.exists()
        hint = HOW_TO_MAKE.format(as_typed(datastore.path))
        why = str(error) if begun else f"no codes in {folder.name} ({hint})"
        return Choice(None, why)
    except (IndexMismatchError, OSError) as error:
        if codes != "auto":
            raise
        warnings.warn(f"searching without codes: {error}", KnnextWarning, stacklevel=4)
        return Choice(None, str(error))


def _of_tensors(store: TensorStore, codes: Codes) -> Choice:
    if isinstance(codes, StoredCodes):
        raise TypeError("codes must be True, False or KeyCodes where keys are tensors")
    if codes is True:
        return Choice(store.encode(), "made of the keys")
    return Choice(None, "codes=True would make some")


def _given(datastore: Datastore, codes: KeyCodes) -> Choice:
    shape, device = tuple(codes.codes.shape), codes.device
    if shape != (datastore.num_entries, datastore.dim) or device.type != "cpu":
        raise ValueError(
            f"codes must be of the datastore's keys, {(datastore.num_entries, datastore.dim)} on "
            f"the CPU, got {shape} on {device}"
        )
    return Choice(codes, "given")


def describe_choice(datastore: Datastore, choice: Choice, resident_bytes: int) -> str:
    """One line: what a search goes through, how many bytes of it, where they are kept."""
    key_bytes = datastore.num_entries * datastore.meta.row_bytes
    if tensor_store(datastore) is not None:
        by = "over all keys" if choice.codes is None else "by eight-bit codes"
        extra = "" if choice.codes is None else f", codes {binary_size(choice.codes.nbytes)}"
        return f"exact search: {by}; keys {binary_size(key_bytes)} in memory{extra}"
    read = key_bytes if choice.codes is None else choice.codes.nbytes
    kept = "resident" if read <= resident_bytes else "streamed"
    if choice.codes is None:
        return f"exact search: over all keys, {binary_size(read)}, {kept}; {choice.why}"
    how = "copied" if datastore.keys.selected else "mapped, of which only likely rows are read"
    keys = f"keys {binary_size(key_bytes)}, {how}"
    return f"exact search: by eight-bit codes ({choice.why}), {binary_size(read)}, {kept}; {keys}"
