"""knn_search as an op: errors, gradients, torch.compile, threads, memory, vector paths."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import knnext
from knnext import _host
from knnext.testing import assert_equal_results, assert_search
from tests.ops.bad_arguments import assert_refused

Q, X = torch.randn(4, 6), torch.randn(50, 6)
N32 = torch.zeros(50)
INIT_D, INIT_I = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64)

BAD = {
    "queries dtype": (Q.double(), X, 3, {}, "queries must be a float16, bfloat16 or float32"),
    "queries rank": (Q[0], X, 3, {}, "tensor of shape (Q, D), got a float32 tensor of shape (6,)"),
    "no dimension": (Q[:, :0], X[:, :0], 3, {}, "queries must have D >= 1"),
    "keys dtype": (Q, X.half(), 3, {}, "keys must be a float32 tensor of shape (N, 6), got a"),
    "keys width": (Q, X[:, :5], 3, {}, "got a float32 tensor of shape (50, 5)"),
    "keys rank": (Q, X[0], 3, {}, "keys must be a float32 tensor of shape (N, 6)"),
    "k": (Q, X, 0, {}, "k must be at least 1, got 0"),
    "negative k": (Q, X, -3, {}, "k must be at least 1, got -3"),
    "metric": (Q, X, 3, {"metric": "cosine"}, 'metric must be "l2" or "ip", got "cosine"'),
    "norms dtype": (Q, X, 3, {"key_sqnorms": N32.half()}, "key_sqnorms must be a float32 tensor"),
    "norms length": (Q, X, 3, {"key_sqnorms": N32[1:]}, "of shape (50,), got a float32 tensor"),
    "offset": (Q, X, 3, {"index_offset": -1}, "index_offset must be at least 0, got -1"),
    "far offset": (Q, X, 3, {"index_offset": (1 << 63) - len(X)}, "index_offset must be at most"),
    "one init": (Q, X, 3, {"init_distances": INIT_D}, "got init_distances alone"),
    "other init": (Q, X, 3, {"init_indices": INIT_I}, "got init_indices alone"),
    "bytes": (Q.byte(), X, 3, {}, "got a uint8 tensor"),
    "init rows": (
        Q,
        X,
        3,
        {"init_distances": INIT_D[1:], "init_indices": INIT_I[1:]},
        "init_distances must be a float32 tensor of shape (4, m)",
    ),
    "init width": (
        Q,
        X,
        3,
        {"init_distances": INIT_D, "init_indices": INIT_I[:, 1:]},
        "init_indices must be an int64 tensor of shape (4, 2)",
    ),
    "init dtype": (
        Q,
        X,
        3,
        {"init_distances": INIT_D, "init_indices": INIT_I.int()},
        "init_indices must be an int64 tensor of shape (4, 2), got an int32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_alike_by_real_and_fake_tensors(name: str) -> None:
    queries, keys, k, kwargs, match = BAD[name]
    assert_refused(knnext.knn_search, match, queries, keys, k, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    queries, keys = Q.to(dtype), X.to(dtype)
    for kwargs in (
        {},
        {"metric": "ip", "refine": True, "index_offset": 3},
        {"key_sqnorms": N32, "init_distances": INIT_D, "init_indices": INIT_I},
    ):
        torch.library.opcheck(torch.ops.knnext.knn_search, (queries, keys, 7), kwargs)
    with_grad = (queries.clone().requires_grad_(), keys.clone().requires_grad_(), 7)
    torch.library.opcheck(torch.ops.knnext.knn_search, with_grad, {})


def test_no_gradient_and_no_warning() -> None:
    queries, keys = Q.clone().requires_grad_(), X.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distances, indices = knnext.knn_search(queries, keys, 3)
        assert not distances.requires_grad and not indices.requires_grad
        knnext.rescore(queries, keys, indices).sum().backward()
    assert queries.grad is not None and keys.grad is not None


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    def step(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        distances, indices = knnext.knn_search(2 * queries, keys, 3, key_sqnorms=None)
        return distances + 1, indices

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, num_keys in ((4, 50), (5, 31)):
        queries, keys = torch.randn(rows, 6, requires_grad=True), torch.randn(num_keys, 6)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*autograd.*")
            assert_equal_results(compiled(queries, keys), step(queries, keys))


@pytest.mark.parametrize("num_queries", [1, 20, 150])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_the_same_bits_whatever_the_threads(num_queries: int, metric: str) -> None:
    queries, keys = torch.randn(num_queries, 130), torch.randn(5000, 130)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2, 8):
            torch.set_num_threads(threads)
            results.append(knnext.knn_search(queries, keys, 300, metric))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_equal_results(result, results[0])


def test_the_same_bits_whatever_the_matmul_precision() -> None:
    queries, keys = torch.randn(64, 256), torch.randn(2000, 256)
    want = knnext.knn_search(queries, keys, 50)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert_equal_results(knnext.knn_search(queries, keys, 50), want)
    finally:
        torch.set_float32_matmul_precision(before)


def test_arguments_are_left_alone() -> None:
    init_d, init_i = torch.tensor([[3.0, 1.0]] * 4), torch.tensor([[1, -1]] * 4)
    given = [Q, X, N32, init_d, init_i]
    copies = [t.clone() for t in given]
    knnext.knn_search(
        Q, X, 5, key_sqnorms=N32, init_distances=init_d, init_indices=init_i, refine=True
    )
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


MEASURE = """
import resource, sys, torch, knnext
num_queries, num_keys, dim, k, transposed = map(int, sys.argv[1:])
keys = torch.ones(1, dim).half().expand(num_keys, dim)
if transposed:
    keys = torch.ones(dim, num_keys).half().T
queries = torch.randn(num_queries, dim).half()
knnext.knn_search(queries[:1], keys[:8], 1)
out = num_queries * k * 12
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
knnext.knn_search(queries, keys, k)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 - out)
"""


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "dim", "k", "transposed"),
    [
        (3000, 4000, 32, 1024, 0),  # the scores alone would be 48 MB, the lists 3 GB at k = N
        # A copy of the keys would be 200 MB.
        pytest.param(16, 400_000, 256, 8, 1, marks=pytest.mark.slow),
        pytest.param(2, 300_000, 16, 200_000, 0, marks=pytest.mark.slow),
    ],
)
def test_memory_stays_within_the_contract(num_queries, num_keys, dim, k, transposed) -> None:
    arguments = [str(a) for a in (num_queries, num_keys, dim, k, transposed)]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    used = int(run.stdout)
    per_query = max(128 << 10, 64 * k)
    assert used <= (256 << 20) + num_queries * per_query
    plan = _host.SearchPlan(
        queries=num_queries,
        entries=num_keys,
        dim=dim,
        k=k,
        element_bytes=2,
        num_units=torch.get_num_threads(),
    )
    # The plan knows: selection's scratch and pages of torch's pool are the rest.
    assert used <= plan.workspace_bytes + 48 * k + (24 << 20)


def test_an_unknown_vector_path_is_named() -> None:
    code = "import torch, knnext; knnext.knn_search(torch.ones(1, 1), torch.ones(1, 1), 1)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "KNNEXT_CPU_ISA": "sse9"},
    )
    assert run.returncode == 1
    *others, widest = _host.build_info()["vector_paths"]
    assert f"KNNEXT_CPU_ISA must be {', '.join(others)} or {widest}, not sse9" in run.stderr


@pytest.mark.slow
def test_every_vector_path_finds_the_same_neighbors(tmp_path) -> None:
    torch.save({"queries": torch.randn(20, 77), "keys": torch.randn(3000, 77)}, tmp_path / "in")
    code = (
        "import sys, torch, knnext; t = torch.load(sys.argv[1]);"
        "torch.save(knnext.knn_search(t['queries'], t['keys'], 40), sys.argv[2])"
    )
    for path in _host.usable_cpu_isas():
        out = tmp_path / path
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "in"), str(out)],
            check=True,
            env={**os.environ, "KNNEXT_CPU_ISA": path},
        )
        data = torch.load(tmp_path / "in")
        assert_search(torch.load(out), data["queries"], data["keys"], 40)
