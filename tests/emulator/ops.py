"""The ops of csrc/cuda as they run in the emulator: the real launchers on CPU tensors.

Outputs lie between guards, which must stay untouched, and start as poison.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from emulator.build import call, load

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
GUARD = 64
MARK = 77


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A C struct of csrc/params.h: "p" pointer, "q" int64, "i" int32, "d" double, "b" bool."""
    kinds = {
        "p": ctypes.c_void_p,
        "q": ctypes.c_int64,
        "i": ctypes.c_int32,
        "d": ctypes.c_double,
        "b": ctypes.c_bool,
        "R": globals().get("RowParameter"),
        "N": globals().get("Neighbors"),
    }
    pairs = [(f"f{i}", kinds[kind]) for i, kind in enumerate(fields)]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


RowParameter = _struct("RowParameter", "dpiq")
Neighbors = _struct("Neighbors", "ppqqbqiR")
SoftmaxParams = _struct("SoftmaxParams", "Nqpp")
InterpolateParams = _struct("InterpolateParams", "NpqiRqpp")
TargetParams = _struct("TargetParams", "Npqbp")
MergeParams = _struct("MergeParams", "ppqqqqqppp")
SqnormsParams = _struct("SqnormsParams", "pqqqip")
RescoreParams = _struct("RescoreParams", "ppqqqqqqpqibp")


class Output:
    """A contiguous tensor of poison between guards."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, skew: int = 0) -> None:
        size = int(torch.tensor(shape).prod())
        # 64-byte aligned like torch's own, then `skew` elements on.
        self.memory = torch.full((size + 2 * GUARD + skew,), MARK, dtype=dtype)
        self.inside = slice(GUARD + skew, GUARD + skew + size)
        self.memory[self.inside] = -12345
        self.tensor = self.memory[self.inside].view(shape)

    def checked(self) -> Tensor:
        before, after = self.memory[: self.inside.start], self.memory[self.inside.stop :]
        assert (before == MARK).all() and (after == MARK).all(), "wrote outside the output"
        return self.tensor.clone()


def _run(name: str, seed: int, params: ctypes.Structure) -> None:
    call(getattr(load(), f"emulate_{name}"), seed, ctypes.byref(params))


def _row_parameter(value: float | Tensor) -> Any:
    if isinstance(value, Tensor):
        stride = value.stride(0) if value.dim() else 0
        return RowParameter(0.0, value.data_ptr(), DTYPES[value.dtype], stride)
    return RowParameter(value, None, 3, 0)


def _neighbors(distances: Tensor, tokens: Tensor, temperature: float | Tensor) -> Any:
    assert distances.dtype == torch.float32
    return Neighbors(
        distances.data_ptr(),
        tokens.data_ptr(),
        distances.stride(0),
        tokens.stride(0),
        tokens.dtype == torch.int32,
        *distances.shape,
        _row_parameter(temperature),
    )


def knn_softmax(
    distances: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    vocab_size: int,
    seed: int = 1,
    skew: int = 0,
) -> Tensor:
    out = Output((distances.shape[0], vocab_size), torch.float32, skew)
    neighbors = _neighbors(distances, tokens, temperature)
    _run("knn_softmax", seed, SoftmaxParams(neighbors, vocab_size, out.tensor.data_ptr(), None))
    return out.checked()


def knn_interpolate(
    lm_logits: Tensor,
    distances: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    lmbda: float | Tensor,
    seed: int = 1,
    skew: int = 0,
) -> Tensor:
    out = Output(tuple(lm_logits.shape), torch.float32, skew)
    params = InterpolateParams(
        _neighbors(distances, tokens, temperature),
        lm_logits.data_ptr(),
        lm_logits.stride(0),
        DTYPES[lm_logits.dtype],
        _row_parameter(lmbda),
        lm_logits.shape[1],
        out.tensor.data_ptr(),
        None,
    )
    _run("knn_interpolate", seed, params)
    return out.checked()


def knn_target_log_prob(
    distances: Tensor, tokens: Tensor, targets: Tensor, temperature: float | Tensor, seed: int = 1
) -> Tensor:
    out = Output((distances.shape[0],), torch.float32)
    narrow = targets.dtype == torch.int32
    neighbors = _neighbors(distances, tokens, temperature)
    params = TargetParams(
        neighbors, targets.data_ptr(), targets.stride(0), narrow, out.tensor.data_ptr()
    )
    _run("knn_target_log_prob", seed, params)
    return out.checked()


def merge_topk(distances: Tensor, indices: Tensor, k: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    rows, m = distances.shape
    out_d, out_i = Output((rows, k), torch.float32), Output((rows, k), torch.int64)
    params = MergeParams(
        distances.data_ptr(),
        indices.data_ptr(),
        distances.stride(0),
        indices.stride(0),
        rows,
        m,
        k,
        out_d.tensor.data_ptr(),
        out_i.tensor.data_ptr(),
        None,
    )
    _run("merge_topk", seed, params)
    return out_d.checked(), out_i.checked()


def key_sqnorms(keys: Tensor, seed: int = 1) -> Tensor:
    out = Output((keys.shape[0],), torch.float32)
    params = SqnormsParams(
        keys.data_ptr(), keys.stride(0), *keys.shape, DTYPES[keys.dtype], out.tensor.data_ptr()
    )
    _run("key_sqnorms", seed, params)
    return out.checked()


def rescore(
    queries: Tensor, keys: Tensor, indices: Tensor, metric: str = "l2", seed: int = 1
) -> Tensor:
    out = Output(tuple(indices.shape), torch.float32)
    params = RescoreParams(
        queries.data_ptr(),
        keys.data_ptr(),
        queries.stride(0),
        keys.stride(0),
        queries.shape[0],
        keys.shape[0],
        queries.shape[1],
        indices.shape[1],
        indices.data_ptr(),
        indices.stride(0),
        DTYPES[queries.dtype],
        metric == "ip",
        out.tensor.data_ptr(),
    )
    _run("rescore", seed, params)
    return out.checked()
