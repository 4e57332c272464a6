"""Argument checks for fake tensors and the fallback: the words of csrc/checks.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ALL_FLOATS = (*FLOATS, torch.float64)
INTEGERS = (torch.int64, torch.int32)
MAX_K_CUDA = 16384
MAX_INT64 = (1 << 63) - 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(t: Tensor) -> str:
    return "(" + ", ".join(str(s) for s in t.shape) + (",)" if t.dim() == 1 else ")")


def _number(value: float) -> str:
    """With as few digits, from six up, as tell it from every other number."""
    texts = (format(value, f".{precision}g") for precision in range(6, 18))
    return next((text for text in texts if float(text) == value), format(value, ".17g"))


def _article(text: str) -> str:
    return f"an {text}" if text.startswith("i") else f"a {text}"


def _describe(t: Tensor) -> str:
    return f"{_article(_name(t.dtype))} tensor of shape {_shape(t)}"


def _names(dtypes: Sequence[torch.dtype]) -> str:
    names = [_name(d) for d in dtypes]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def fail(op: str, complaint: str) -> NoReturn:
    raise RuntimeError(f"knnext::{op}: {complaint}")


def _tensor(
    op: str,
    name: str,
    t: Tensor,
    dtypes: Sequence[torch.dtype],
    sizes: Sequence[Any],
    shape: str,
) -> None:
    right = t.dim() == len(sizes) and t.dtype in dtypes
    right = right and all(w is None or bool(g == w) for g, w in zip(t.shape, sizes, strict=True))
    if not right:
        wanted = f"{_article(_names(dtypes))} tensor of shape {shape}"
        fail(op, f"{name} must be {wanted}, got {_describe(t)}")


def _device(op: str, name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.device != other.device:
        wanted = f"{name} must be on the device of {other_name}, {other.device}"
        fail(op, f"{wanted}, got {t.device}")


def _queries_keys(
    op: str,
    queries: Tensor,
    keys: Tensor,
    dtypes: Sequence[torch.dtype] = FLOATS,
    *,
    on_cpu_too: bool = False,
) -> None:
    _tensor(op, "queries", queries, dtypes, (None, None), "(Q, D)")
    if queries.shape[1] < 1:
        fail(op, f"queries must have D >= 1, got {_describe(queries)}")
    dim = queries.shape[1]
    _tensor(op, "keys", keys, (queries.dtype,), (None, dim), f"(N, {dim})")
    if not (on_cpu_too and keys.device.type == "cpu"):
        _device(op, "keys", keys, "queries", queries)


def _k(op: str, k: int, like: Tensor) -> None:
    if k < 1:
        fail(op, f"k must be at least 1, got {k}")
    if like.device.type == "cuda" and k > MAX_K_CUDA:
        fail(op, f"k must be at most {MAX_K_CUDA} on CUDA, got {k}")


def _metric(op: str, metric: str) -> None:
    if metric not in ("l2", "ip"):
        fail(op, f'metric must be "l2" or "ip", got "{metric}"')


def knn_search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str = "l2",
    *,
    key_sqnorms: Tensor | None = None,
    index_offset: int = 0,
    init_distances: Tensor | None = None,
    init_indices: Tensor | None = None,
    refine: bool = False,
    op: str = "knn_search",
) -> None:
    # By codes on a GPU, the winners alone are read of keys on the CPU.
    _queries_keys(op, queries, keys, on_cpu_too=op == "knn_search_codes")
    _k(op, k, queries)
    _metric(op, metric)
    num_queries, num_keys = queries.shape[0], keys.shape[0]
    if key_sqnorms is not None:
        wanted = f"({num_keys},)"
        _tensor(op, "key_sqnorms", key_sqnorms, (torch.float32,), (num_keys,), wanted)
        _device(op, "key_sqnorms", key_sqnorms, "queries", queries)
    if index_offset < 0:
        fail(op, f"index_offset must be at least 0, got {index_offset}")
    if index_offset > MAX_INT64 - num_keys:
        wanted = f"index_offset must be at most 2^63 - 1 - N = {MAX_INT64 - num_keys}"
        fail(op, f"{wanted}, got {index_offset}")
    if (init_distances is None) != (init_indices is None):
        alone = "init_indices" if init_distances is None else "init_distances"
        fail(op, f"init_distances and init_indices must be given together, got {alone} alone")
    if init_distances is not None and init_indices is not None:
        rows, m = (num_queries, None), f"({num_queries}, m)"
        _tensor(op, "init_distances", init_distances, (torch.float32,), rows, m)
        same, m = init_distances.shape, f"({num_queries}, {init_distances.shape[1]})"
        _tensor(op, "init_indices", init_indices, (torch.int64,), same, m)
        _device(op, "init_distances", init_distances, "queries", queries)
        _device(op, "init_indices", init_indices, "queries", queries)


def knn_search_codes(
    queries: Tensor,
    keys: Tensor,
    codes: Tensor,
    code_stats: Tensor,
    center: Tensor,
    k: int,
    metric: str = "l2",
    **options: Any,
) -> None:
    op = "knn_search_codes"
    knn_search(queries, keys, k, metric, op=op, **options)
    rows, dim = keys.shape
    _tensor(op, "codes", codes, (torch.int8,), (rows, dim), f"({rows}, {dim})")
    _tensor(op, "code_stats", code_stats, (torch.float32,), (rows, 3), f"({rows}, 3)")
    _tensor(op, "center", center, (torch.float32,), (dim,), f"({dim},)")
    for name, t in (("codes", codes), ("code_stats", code_stats), ("center", center)):
        _device(op, name, t, "queries", queries)


def encode_keys(keys: Tensor, center: Tensor) -> None:
    op = "encode_keys"
    _tensor(op, "keys", keys, FLOATS, (None, None), "(N, D)")
    if keys.shape[1] < 1:
        fail(op, f"keys must have D >= 1, got {_describe(keys)}")
    dim = keys.shape[1]
    _tensor(op, "center", center, (torch.float32,), (dim,), f"({dim},)")
    _device(op, "center", center, "keys", keys)


def key_sqnorms(keys: Tensor) -> None:
    _tensor("key_sqnorms", "keys", keys, FLOATS, (None, None), "(N, D)")
    if keys.shape[1] < 1:
        fail("key_sqnorms", f"keys must have D >= 1, got {_describe(keys)}")


def rescore(queries: Tensor, keys: Tensor, indices: Tensor, metric: str = "l2") -> None:
    dtypes = FLOATS if queries.device.type == "cuda" else ALL_FLOATS
    _queries_keys("rescore", queries, keys, dtypes)
    rows = queries.shape[0]
    _tensor("rescore", "indices", indices, (torch.int64,), (rows, None), f"({rows}, m)")
    _device("rescore", "indices", indices, "queries", queries)
    _metric("rescore", metric)


def merge_topk(distances: Tensor, indices: Tensor, k: int) -> None:
    op = "merge_topk"
    _tensor(op, "distances", distances, (torch.float32,), (None, None), "(Q, m)")
    _tensor(op, "indices", indices, (torch.int64,), distances.shape, _shape(distances))
    _device(op, "indices", indices, "distances", distances)
    _k(op, k, distances)


def _neighbors(op: str, distances: Tensor, tokens: Tensor) -> None:
    wide_too = (torch.float32, torch.float64)
    dtypes = (torch.float32,) if distances.device.type == "cuda" else wide_too
    _tensor(op, "distances", distances, dtypes, (None, None), "(Q, k)")
    _tensor(op, "tokens", tokens, INTEGERS, distances.shape, _shape(distances))
    _device(op, "tokens", tokens, "distances", distances)
    if distances.device.type == "cuda" and distances.shape[1] > MAX_K_CUDA:
        fail(op, f"k must be at most {MAX_K_CUDA} on CUDA, got {distances.shape[1]}")


def _row_parameter(op: str, name: str, value: Tensor, distances: Tensor) -> None:
    rows = distances.shape[0]
    right = value.dim() == 0 or (value.dim() == 1 and bool(value.shape[0] == rows))
    if not right or value.dtype not in ALL_FLOATS:
        wanted = f"a number or a {_names(ALL_FLOATS)} tensor of shape () or ({rows},)"
        fail(op, f"{name} must be {wanted}, got {_describe(value)}")
    _device(op, name, value, "distances", distances)


def _temperature(op: str, temperature: float | Tensor, distances: Tensor) -> None:
    if isinstance(temperature, Tensor):
        _row_parameter(op, "temperature", temperature, distances)
    elif not (temperature > 0 and math.isfinite(temperature)):
        fail(op, f"temperature must be a finite number above 0, got {_number(temperature)}")


def _lmbda(op: str, lmbda: float | Tensor, distances: Tensor) -> None:
    if isinstance(lmbda, Tensor):
        _row_parameter(op, "lmbda", lmbda, distances)
    elif not 0 <= lmbda <= 1:
        fail(op, f"lmbda must lie in [0, 1], got {_number(lmbda)}")


def knn_softmax(
    distances: Tensor, tokens: Tensor, temperature: float | Tensor, vocab_size: int
) -> None:
    op = "knn_softmax"
    _neighbors(op, distances, tokens)
    _temperature(op, temperature, distances)
    if vocab_size < 1:
        fail(op, f"vocab_size must be at least 1, got {vocab_size}")


def knn_interpolate(
    lm_logits: Tensor,
    distances: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    lmbda: float | Tensor,
) -> None:
    op = "knn_interpolate"
    _neighbors(op, distances, tokens)
    rows = distances.shape[0]
    _tensor(op, "lm_logits", lm_logits, ALL_FLOATS, (rows, None), f"({rows}, V)")
    if lm_logits.shape[1] < 1:
        fail(op, f"lm_logits must have V >= 1, got {_describe(lm_logits)}")
    _device(op, "lm_logits", lm_logits, "distances", distances)
    _temperature(op, temperature, distances)
    _lmbda(op, lmbda, distances)


def knn_target_log_prob(
    distances: Tensor, tokens: Tensor, targets: Tensor, temperature: float | Tensor
) -> None:
    op = "knn_target_log_prob"
    _neighbors(op, distances, tokens)
    rows = distances.shape[0]
    _tensor(op, "targets", targets, INTEGERS, (rows,), f"({rows},)")
    _device(op, "targets", targets, "distances", distances)
    _temperature(op, temperature, distances)


def _values(op: str, wanted: str, values: Tensor, wrong: Tensor) -> None:
    """Fails on the first row that holds a wrong value, and says what it is."""
    if bool(wrong.any()):
        row = int(wrong.reshape(wrong.shape[0], -1).any(1).nonzero()[0])
        got = values[row][wrong[row]].reshape(-1)[0].item()
        fail(op, f"{wanted}, got {got if isinstance(got, int) else format(got, 'g')} in row {row}")


def _token_values(op: str, tokens: Tensor, vocab_size: int) -> None:
    wanted = f"tokens must lie in [-1, V) with V = {vocab_size}"
    _values(op, wanted, tokens, (tokens < -1) | (tokens >= vocab_size))


def _temperature_values(op: str, temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        t = temperature.reshape(-1)
        wanted = "temperature must be a finite number above 0"
        _values(op, wanted, t, ~((t > 0) & t.isfinite()))


def _knn_softmax_values(_d: Tensor, tokens: Tensor, t: float | Tensor, vocab_size: int) -> None:
    _temperature_values("knn_softmax", t)
    _token_values("knn_softmax", tokens, vocab_size)


def _knn_interpolate_values(
    lm_logits: Tensor, _d: Tensor, tokens: Tensor, t: float | Tensor, lmbda: float | Tensor
) -> None:
    op = "knn_interpolate"
    _temperature_values(op, t)
    if isinstance(lmbda, Tensor):
        weight = lmbda.reshape(-1)
        wrong = ~((weight >= 0) & (weight <= 1))
        _values(op, "lmbda must lie in [0, 1]", weight, wrong)
    _token_values(op, tokens, lm_logits.shape[1])


def _knn_target_log_prob_values(
    _d: Tensor, tokens: Tensor, _targets: Tensor, t: float | Tensor
) -> None:
    op = "knn_target_log_prob"
    _temperature_values(op, t)
    _values(op, "tokens must be at least -1", tokens, tokens < -1)


def _rescore_values(_queries: Tensor, keys: Tensor, indices: Tensor, _metric: str = "l2") -> None:
    num_keys = keys.shape[0]
    wrong = (indices < -1) | (indices >= num_keys)
    if bool(wrong.any()):
        wanted = f"indices must lie in [-1, {num_keys})"
        fail("rescore", f"{wanted}, got {int(indices[wrong][0])}")


# What the compiled CPU ops find wrong while they read, for the fallback: fake tensors hold nothing
# to read, and on CUDA to read would be to wait.
VALUE_CHECKS: dict[str, Callable[..., None]] = {
    "rescore": _rescore_values,
    "knn_softmax": _knn_softmax_values,
    "knn_interpolate": _knn_interpolate_values,
    "knn_target_log_prob": _knn_target_log_prob_values,
}

CHECKS: dict[str, Callable[..., None]] = {
    "knn_search": knn_search,
    "key_sqnorms": key_sqnorms,
    "rescore": rescore,
    "merge_topk": merge_topk,
    "encode_keys": encode_keys,
    "knn_search_codes": knn_search_codes,
    "knn_softmax": knn_softmax,
    "knn_interpolate": knn_interpolate,
    "knn_target_log_prob": knn_target_log_prob,
}
