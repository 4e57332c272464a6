"""The ops of csrc/cuda as they run in the emulator: the real launchers on CPU tensors.

Outputs lie between guards, which must stay untouched, and start as poison.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from tests.emulator.build import call, load

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
GUARD = 64
MARK = 77


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A C struct of csrc/cuda/params.h: "p" pointer, "q" int64, "i" int32, "d" double, "b" bool."""
    kinds = {
        "p": ctypes.c_void_p,
        "q": ctypes.c_int64,
        "i": ctypes.c_int32,
        "d": ctypes.c_double,
        "b": ctypes.c_bool,
        "R": globals().get("RowParameter"),
        "N": globals().get("Neighbors"),
        "G": globals().get("NeighborGradients"),
    }
    pairs = [(f"f{i}", kinds[kind]) for i, kind in enumerate(fields)]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


RowParameter = _struct("RowParameter", "dpiq")
Neighbors = _struct("Neighbors", "ppqqbqiR")
SoftmaxParams = _struct("SoftmaxParams", "Nqpp")
InterpolateParams = _struct("InterpolateParams", "NpqiRqppp")
TargetParams = _struct("TargetParams", "Npqbp")
NeighborGradients = _struct("NeighborGradients", "pp")
SoftmaxGradientsParams = _struct("SoftmaxGradientsParams", "NpqqG")
InterpolateGradientsParams = _struct("InterpolateGradientsParams", "NpqiRqppqqGppp")
TargetGradientsParams = _struct("TargetGradientsParams", "NpqbppqqG")
MergeParams = _struct("MergeParams", "ppqqqqqppp")
SqnormsParams = _struct("SqnormsParams", "pqqqip")
RescoreParams = _struct("RescoreParams", "ppqqqqqqpqibp")
RescoreGradientsParams = _struct("RescoreGradientsParams", "ppqqqqqqpqpqpibpp")


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


class _NeighborOutputs:
    """What every gradient of a mixing op writes: of distances and, by row, of the temperature."""

    def __init__(self, distances: Tensor) -> None:
        self.distances = Output(tuple(distances.shape), torch.float32)
        self.temperature = Output((distances.shape[0],), torch.float32)
        self.struct = NeighborGradients(
            self.distances.tensor.data_ptr(), self.temperature.tensor.data_ptr()
        )

    def checked(self) -> tuple[Tensor, Tensor]:
        return self.distances.checked(), self.temperature.checked()


def knn_softmax_gradients(
    grad: Tensor, distances: Tensor, tokens: Tensor, temperature: float | Tensor, seed: int = 1
) -> tuple[Tensor, Tensor]:
    out = _NeighborOutputs(distances)
    neighbors = _neighbors(distances, tokens, temperature)
    params = SoftmaxGradientsParams(
        neighbors, grad.data_ptr(), grad.stride(0), grad.shape[1], out.struct
    )
    _run("knn_softmax_gradients", seed, params)
    return out.checked()


def knn_target_log_prob_gradients(
    grad: Tensor,
    distances: Tensor,
    tokens: Tensor,
    targets: Tensor,
    output: Tensor,
    temperature: float | Tensor,
    seed: int = 1,
) -> tuple[Tensor, Tensor]:
    out = _NeighborOutputs(distances)
    params = TargetGradientsParams(
        _neighbors(distances, tokens, temperature),
        targets.data_ptr(),
        targets.stride(0),
        targets.dtype == torch.int32,
        grad.data_ptr(),
        output.data_ptr(),
        grad.stride(0),
        output.stride(0),
        out.struct,
    )
    _run("knn_target_log_prob_gradients", seed, params)
    return out.checked()


def knn_interpolate_gradients(
    grad: Tensor,
    lm_logits: Tensor,
    distances: Tensor,
    tokens: Tensor,
    output: Tensor,
    temperature: float | Tensor,
    lmbda: float | Tensor,
    need_logits: bool = True,
    need_lmbda: bool = True,
    seed: int = 1,
    skew: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the op; ``skew`` moves the gradient of the logits off its alignment."""
    rows, vocab_size = lm_logits.shape
    out = _NeighborOutputs(distances)
    to_logits = Output((rows if need_logits else 0, vocab_size), lm_logits.dtype, skew)
    to_lmbda = Output((rows if need_lmbda else 0,), torch.float32)
    params = InterpolateGradientsParams(
        _neighbors(distances, tokens, temperature),
        lm_logits.data_ptr(),
        lm_logits.stride(0),
        DTYPES[lm_logits.dtype],
        _row_parameter(lmbda),
        vocab_size,
        grad.data_ptr(),
        output.data_ptr(),
        grad.stride(0),
        output.stride(0),
        out.struct,
        to_logits.tensor.data_ptr() if need_logits else None,
        to_lmbda.tensor.data_ptr() if need_lmbda else None,
        None,
    )
    _run("knn_interpolate_gradients", seed, params)
    return to_logits.checked(), *out.checked(), to_lmbda.checked()


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


def rescore_gradients(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    indices: Tensor,
    order: Tensor | None,
    metric: str = "l2",
    need_queries: bool = True,
    seed: int = 1,
) -> tuple[Tensor, Tensor]:
    dim = queries.shape[1]
    to_queries = Output((queries.shape[0] if need_queries else 0, dim), queries.dtype)
    to_keys = Output((keys.shape[0] if order is not None else 0, dim), keys.dtype)
    to_keys.tensor.zero_()
    params = RescoreGradientsParams(
        queries.data_ptr(),
        keys.data_ptr(),
        queries.stride(0),
        keys.stride(0),
        queries.shape[0],
        keys.shape[0],
        dim,
        indices.shape[1],
        indices.data_ptr(),
        indices.stride(0),
        grad.data_ptr(),
        grad.stride(0),
        None if order is None else order.data_ptr(),
        DTYPES[queries.dtype],
        metric == "ip",
        to_queries.tensor.data_ptr() if need_queries else None,
        None if order is None else to_keys.tensor.data_ptr(),
    )
    _run("rescore_gradients", seed, params)
    return to_queries.checked(), to_keys.checked()
