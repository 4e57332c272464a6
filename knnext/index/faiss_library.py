"""All calls into the `faiss` package, which is loaded only when one of them is made.

torch is imported first on purpose: loading FAISS before it has given wrong neighbors.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnext.errors import KnnextWarning, missing_package
from knnext.index.row_set import RowSet, Runs

#: What FAISS says of a kind that takes no parameters, or no selector among them.
_NO_FILTER = ("not supported", "invalid search params", "cannot be combined")

Found = tuple[NDArray[np.float32], NDArray[np.int64]]


def load() -> ModuleType:
    """The faiss module, or an error that says how to get it."""
    try:
        import faiss
    except ImportError:
        raise missing_package("FaissIndex needs", "faiss", "faiss") from None
    return faiss


def version() -> str:
    return str(load().__version__)


def num_gpus() -> int:
    """GPUs that this FAISS can use; none where it was built without."""
    faiss = load()
    return int(faiss.get_num_gpus()) if hasattr(faiss, "get_num_gpus") else 0


def create(factory: str, dim: int, metric: str) -> Any:
    """An empty index from a factory string."""
    faiss = load()
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        index = faiss.index_factory(dim, factory, kind)
    except RuntimeError as error:
        reason = _reason(error)
        raise ValueError(
            f"factory {factory!r} does not suit FAISS for dim {dim} and metric {metric!r}: {reason}"
        ) from None
    check_kind(index, f"factory {factory!r}", metric)
    for part in _parts(index):
        # The factory asks for codes ordered for Hamming filters, which are not used here. The
        # annealing behind it took 12.5 of 12.9 s on a small index; distances stay the same.
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False
    return index


def check_kind(index: Any, what: str, metric: str) -> None:
    """Refuse what FAISS makes and even fills, but what cannot be searched by `metric` then.

    ValueError, of which `what` is the subject.
    """
    faiss = load()
    found = metric_of(index)
    reasons = {
        faiss.IndexLSH: "its distances are numbers of differing bits, not those of the keys",
        faiss.IndexLattice: "FAISS writes its codes and cannot read them",
        faiss.IndexIDMap: "it wants ids of its own, where here a row's number is its id",
        faiss.IndexIDMap2: "it wants ids of its own, where here a row's number is its id",
    }
    for part in _parts(index):
        for kind, reason in reasons.items():
            if isinstance(part, kind):
                raise ValueError(f"{what} does not suit a datastore: {reason}")
    if found != metric:
        raise ValueError(f"{what} does not suit metric {metric!r}: FAISS searches it by {found!r}")


def check_searchable(index: Any, factory: str, keys: NDArray[np.float32]) -> None:
    """Search a copy of a trained, empty index, filled with few (n, D) keys: before the millions.

    ValueError where FAISS cannot do it.
    """
    faiss = load()
    try:
        trial = faiss.deserialize_index(faiss.serialize_index(index))
        add(trial, keys)
        trial = faiss.deserialize_index(faiss.serialize_index(trial))
        if search_among(trial, keys[:1], 1, 1, RowSet([Runs.of([(0, 1)], keep=False)])) is None:
            search(trial, keys[:1], 1)
    except RuntimeError as error:
        raise ValueError(
            f"an index of factory {factory!r} cannot be searched: {_reason(error)}"
        ) from None


def _reason(error: RuntimeError) -> str:
    """What FAISS complains of, without the name of the C++ function that stands before it."""
    return str(error).strip().splitlines()[-1].rpartition(" failed: ")[2]


def train(index: Any, keys: NDArray[np.float32], factory: str) -> None:
    """ValueError where the (n, D) keys cannot train it; FAISS mostly wants more of them."""
    try:
        _own(index, "train")(keys)
    except RuntimeError as error:
        raise ValueError(
            f"{len(keys):,} rows of dim {keys.shape[1]} cannot train an index of factory "
            f"{factory!r}: {_reason(error)}"
        ) from None


def add(index: Any, keys: NDArray[np.float32]) -> None:
    _own(index, "add")(keys)


def search(index: Any, queries: NDArray[np.float32], k: int) -> Found:
    """(Q, k) scores as FAISS gives them and (Q, k) rows, -1 where there are too few."""
    return _own(index, "search")(queries, k)


def search_among(
    index: Any, queries: NDArray[np.float32], k: int, nprobe: int, kept: RowSet
) -> Found | None:
    """The same with nprobe lists and among some rows; None where this kind takes no filter."""
    made = _search_parameters(index, nprobe, kept)
    if made is None:
        return None
    try:
        return _own(index, "search")(queries, k, params=made[0])
    except RuntimeError as error:
        # Product codes without lists and additive quantizers say so when they are asked.
        if any(words in str(error) for words in _NO_FILTER):
            return None
        raise


def _own(index: Any, method: str) -> Any:
    """FAISS's own method. `faiss.contrib.torch_utils`, which anyone may import, puts methods with
    other arguments in their place and leaves them here under another name."""
    return getattr(index, f"{method}_numpy", None) or getattr(index, method)


def metric_of(index: Any) -> str:
    faiss = load()
    if index.metric_type == faiss.METRIC_L2:
        return "l2"
    return "ip" if index.metric_type == faiss.METRIC_INNER_PRODUCT else str(index.metric_type)


def write(index: Any, path: Path) -> None:
    load().write_index(index, str(path))


def read(path: Path, *, mapped: bool = False) -> Any:
    """`mapped`: what inverted lists hold stays in the file, which must not change."""
    faiss = load()
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)


def to_bytes(index: Any) -> NDArray[np.uint8]:
    content: NDArray[np.uint8] = load().serialize_index(index)
    return content


def from_bytes(content: NDArray[np.uint8]) -> Any:
    return load().deserialize_index(content)


def as_float32(keys: Tensor) -> NDArray[np.float32]:
    """(n, D) keys of any float dtype as the contiguous float32 that FAISS reads."""
    array: NDArray[np.float32] = keys.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def kind_of(index: Any) -> str:
    """Names of the classes that it is made of, such as IndexPreTransform(IndexIVFPQ)."""
    names = [type(part).__name__ for part in _parts(index)]
    return "(".join(names) + ")" * (len(names) - 1)


def mapped_ids(index: Any) -> NDArray[np.int64] | None:
    """(n,) ids that an index gives its rows itself, None where they are the rows' numbers."""
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        return np.asarray(faiss.vector_to_array(index.id_map), dtype=np.int64)
    return None


def inside_map(index: Any) -> Any:
    """The index behind a map of ids, on its own."""
    faiss = load()
    return faiss.clone_index(faiss.downcast_index(faiss.downcast_index(index).index))


def remove_tail(index: Any, rows: int) -> None:
    """Remove what stands behind the first ``rows``, where this kind can."""
    faiss = load()
    with suppress(RuntimeError):
        index.remove_ids(faiss.IDSelectorRange(rows, int(index.ntotal)))


def ivf_of(index: Any) -> Any | None:
    """The inverted file inside an index, or None where it has none."""
    return load().try_extract_index_ivf(index)


def num_lists(index: Any) -> int:
    ivf = ivf_of(index)
    return 0 if ivf is None else int(ivf.nlist)


def set_seed(index: Any, seed: int) -> None:
    """Seed the k-means of the lists and of the codes."""
    for part in _parts(index):
        if hasattr(part, "cp"):
            part.cp.seed = seed
        if hasattr(part, "pq"):
            part.pq.cp.seed = seed


def can_merge(index: Any) -> bool:
    """Whether rows can be added in pieces and joined later: inverted files and flat codes."""
    faiss = load()
    inner = _inner(index)
    return isinstance(inner, (faiss.IndexIVF, faiss.IndexFlatCodes))


def can_slice(index: Any) -> bool:
    """Whether `slice_rows` can take rows of it: each has a code of its own."""
    faiss = load()
    kinds = (faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
    inner = _inner(index)
    plain = isinstance(inner, kinds) and not isinstance(inner, faiss.IndexIVFPQR)
    return plain or isinstance(inner, faiss.IndexFlatCodes)


def slice_rows(index: Any, first: int, last: int) -> Any:
    """The rows [first, last) of an index whose ids are row numbers, counted from the first.

    The index that was given is used up.
    """
    faiss = load()
    inner = _inner(index)
    if not isinstance(inner, faiss.IndexIVF):
        index.remove_ids(faiss.IDSelectorNot(faiss.IDSelectorRange(first, last)))
        return faiss.clone_index(index)  # which has no more room than it wants
    lists = faiss.ArrayInvertedLists(inner.nlist, inner.code_size)
    by_range = faiss.InvertedLists.SUBSET_TYPE_ID_RANGE
    inner.invlists.copy_subset_to(lists, by_range, first, last)
    for number in range(inner.nlist):
        if size := lists.list_size(number):
            ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
            ids -= first
    inner.replace_invlists(lists, True)
    lists.this.disown()
    inner.ntotal = index.ntotal = last - first
    return index


def merge(index: Any, segment: Any) -> None:
    """Append a segment; its ids go on where those of `index` end."""
    flat = isinstance(_inner(index), load().IndexFlatCodes)
    index.merge_from(segment, 0 if flat else index.ntotal)


def to_gpu(index: Any, gpu: bool | str) -> Any | None:
    """A replica on every GPU, with half-precision tables: those of 64-byte codes need it.

    Where a GPU cannot hold it (HNSW, fast-scan codes and others have no GPU form, or memory is
    short) that is an error with ``gpu=True``, and else None, with a warning.
    """
    faiss = load()
    options = faiss.GpuMultipleClonerOptions()
    # Of an IVF-PQ the lookup tables; of a flat index it would be the vectors themselves.
    options.useFloat16 = ivf_of(index) is not None
    try:
        return faiss.index_cpu_to_all_gpus(index, co=options)
    except RuntimeError as error:
        reason = _reason(error)
        if gpu is True:
            raise ValueError(
                f"gpu=True, but FAISS cannot put this index on a GPU: {reason}"
            ) from None
        text = f"FAISS keeps this index on the CPU: {reason}"
        warnings.warn(text, KnnextWarning, stacklevel=2)
        return None


def to_cpu(index: Any) -> Any:
    return load().index_gpu_to_cpu(index)


def _search_parameters(index: Any, nprobe: int, kept: RowSet) -> tuple[Any, list[Any]] | None:
    """Parameters that set nprobe and leave out rows, and what must outlive them.

    None where this kind of index takes no filter. FAISS keeps bare pointers to selectors, so the
    list has to stay alive for as long as the parameters are used.
    """
    faiss = load()
    selector, alive = _selector(kept, index.ntotal)
    inner = _inner(index)
    if isinstance(inner, faiss.IndexIVF):
        made = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
    elif isinstance(inner, faiss.IndexFlatCodes):
        made = faiss.SearchParameters(sel=selector)
    else:
        return None
    if isinstance(faiss.downcast_index(index), faiss.IndexPreTransform):
        alive.append(made)
        made = faiss.SearchParametersPreTransform(index_params=made)
    return made, alive


def set_nprobe(index: Any, nprobe: int, replica: Any | None = None) -> None:
    """Set nprobe on an index that takes no parameters at search time, or on its replica on GPUs.

    Nothing happens where the index has no lists.
    """
    faiss = load()
    if not num_lists(index):  # of a replica FAISS tells none
        return
    if replica is None:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)
    else:
        faiss.GpuParameterSpace().set_index_parameter(replica, "nprobe", nprobe)


def decode(index: Any, rows: Tensor) -> Tensor:
    """(m, D) float32 vectors of (m,) rows, from their codes."""
    faiss = load()
    ivf = ivf_of(index)
    if ivf is not None and ivf.direct_map.type == faiss.DirectMap.NoMap:
        ivf.make_direct_map()  # 8 bytes a row, kept for the life of the index in memory
    if isinstance(faiss.downcast_index(ivf), faiss.IndexIVFFastScan):  # FAISS 1.15 crashes
        raise ValueError("the codes of this index cannot be decoded: FAISS has packed them")
    ids = np.ascontiguousarray(rows.cpu().numpy(), dtype=np.int64)
    try:
        return torch.from_numpy(index.reconstruct_batch(ids))
    except RuntimeError as error:
        raise ValueError(f"the codes of this index cannot be decoded: {error}") from None


def _parts(index: Any) -> list[Any]:
    """An index and those it wraps (behind OPQ, refining, id maps), each with its own class."""
    index = load().downcast_index(index)
    wrapped = getattr(index, "base_index", None) or getattr(index, "index", None)
    return [index] if wrapped is None else [index, *_parts(wrapped)]


def _inner(index: Any) -> Any:
    """The index behind a linear transform such as OPQ, with its own class."""
    faiss = load()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.downcast_index(index.index)
    return index


def _selector(kept: RowSet, ntotal: int) -> tuple[Any, list[Any]]:
    faiss = load()
    if kept.everything:
        return None, []
    if (run := kept.one_run()) is not None:
        inside = faiss.IDSelectorRange(*run[:2])
        return (inside, [inside]) if run[2] else (faiss.IDSelectorNot(inside), [inside])
    # One bit a row answers many runs in one look.
    bits = kept.bits(ntotal)
    return faiss.IDSelectorBitmap(bits), [bits]
