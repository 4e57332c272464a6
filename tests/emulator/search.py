"""The emulated CUDA search as a function of tensors, with the plan's choices open to a test."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from knnext import reference
from tests.emulator.build import call, load

INF = float("inf")
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SHAPES = {"auto": 0, "few": 1, "small": 2, "large": 3, "owner": 4, "filter": 5}
FIELDS = [
    "dtype",
    "num_queries",
    "num_keys",
    "dim",
    "k",
    "inner_product",
    "index_offset",
    "num_init",
    "refine",
    "query_stride",
    "key_stride",
    "shape",
    "resident",
    "chunk_keys",
    "queries_per_pass",
    "num_units",
    "stride",
    "second",
    "rank",
    "capacity",
    "fail_all",
    "owners",
    "owner_words",
    "stages",
    "cluster",
    "num_failed",
]


class Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


def search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str = "l2",
    *,
    seed: int = 1,
    shape: str = "auto",
    init: tuple[Tensor, Tensor] | None = None,
    key_sqnorms: Tensor | None = None,
    failures: list[int] | None = None,
    **options: int,
) -> tuple[Tensor, Tensor]:
    """The emulated search. ``failures`` receives how many queries left the usual path."""
    num_queries, dim = queries.shape
    o = Options(resident=-1, num_units=3)
    o.dtype, o.num_queries, o.num_keys = DTYPES[keys.dtype], num_queries, keys.shape[0]
    o.dim, o.k, o.inner_product, o.shape = dim, k, metric == "ip", SHAPES[shape]
    o.query_stride, o.key_stride = queries.stride(0), keys.stride(0)
    for name, value in options.items():
        assert name in FIELDS
        setattr(o, name, value)
    o.num_init = init[0].shape[1] if init else 0
    distances = torch.full((num_queries, k), float("nan"))
    indices = torch.full((num_queries, k), -7)
    pointer = [ctypes.c_void_p(t.data_ptr()) for t in (queries, keys)]
    earlier = init or (None, None)
    call(
        load().emulate_knn_search,
        seed,
        ctypes.byref(o),
        *pointer,
        key_sqnorms,
        *earlier,
        distances,
        indices,
    )
    if failures is not None:
        failures.append(o.num_failed)
    return distances, indices


def expect(result: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> None:
    distances, indices = reference.knn_search(*args, **kwargs, compute_dtype=torch.float64)
    assert torch.equal(result[1], indices), (result[1] != indices).nonzero()[:5]
    assert torch.equal(result[0], distances.float())


def integers(*size: int, dtype: torch.dtype = torch.float16, high: int = 4) -> Tensor:
    return torch.randint(-high, high + 1, size).to(dtype)


def sampled(**more: int) -> dict[str, int]:
    """One sample of one key in four; about 2 k candidates."""
    return {"stride": 4} | more


ORDERS = ["near to far", "far to near", "equal", "one giant cluster"]


def keys_in_order(order: str, count: int, dim: int) -> Tensor:
    """Keys as they fill the lists of a search from the origin, which expects them at random."""
    keys = integers(count, dim, high=9)
    by_distance = keys.float().square().sum(1).argsort(stable=True)
    if order == "near to far":
        return keys[by_distance].contiguous()
    if order == "far to near":
        return keys[by_distance.flip(0)].contiguous()
    if order == "equal":
        keys[:] = 3
    else:
        assert order == "one giant cluster"
        keys[100 : count - 50] = integers(1, dim)
    return keys
