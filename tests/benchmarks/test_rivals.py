"""The rivals of a search on the CPU, each by the real package; without it, the word for that."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from benchmarks.bench_knn_search import IMPLEMENTATIONS, LEAST_RECALL
from benchmarks.data.search import Data, make_data, recall, truth_of
from benchmarks.data.search_shapes import Shape
from benchmarks.rivals import needs

SHAPE = Shape(5, 3000, 48, 40)
EXACT = ("faiss_flat", "faiss_sq_fp16", "svs_flat", "usearch_exact", "scann_brute_force")
APPROXIMATE = ("faiss_sq8", "usearch_i8")
#: Module and package of what is not among this project's own requirements.
OPTIONAL = {
    "svs_flat": ("svs", "scalable-vs"),
    "usearch_exact": ("usearch.index", "usearch"),
    "usearch_i8": ("usearch.index", "usearch"),
    "scann_brute_force": ("scann", "scann"),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = [
    (name, dtype)
    for name in (*EXACT, *APPROXIMATE)
    for dtype in DTYPES
    if IMPLEMENTATIONS[name].takes(replace(SHAPE, dtype=dtype), "cpu")
]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def worst_distance(data: Data, distances: torch.Tensor, indices: torch.Tensor) -> float:
    """How far a distance is from the true one of its index, relative to the largest."""
    truth = truth_of(data)
    true = truth.distances.gather(1, indices[truth.rows])
    return float((distances[truth.rows] - true).abs().max() / true.max())


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_a_rival_finds_the_nearest(name: str, dtype: torch.dtype, queries: int) -> None:
    data = make_data(replace(SHAPE, queries=queries, dtype=dtype), "cpu")[0]
    with threads(2):
        run = IMPLEMENTATIONS[name].prepare(data)
        distances, indices = run()
        again = run()
    assert indices.dtype == torch.int64 and distances.dtype == torch.float32
    assert tuple(indices.shape) == tuple(distances.shape) == (queries, SHAPE.k)
    assert (distances.diff(dim=1) >= 0).all(), "nearest first"
    assert torch.equal(again[1], indices), "a second call gives the same"
    assert distances.data_ptr() != again[0].data_ptr(), "and writes elsewhere"
    if name in EXACT:
        assert recall(data, (distances, indices)) >= LEAST_RECALL
        assert worst_distance(data, distances, indices) < 1e-5
    else:
        assert recall(data, (distances, indices)) >= 0.9
        assert worst_distance(data, distances, indices) < 0.03


@pytest.mark.parametrize("name", [*EXACT, *APPROXIMATE])
def test_an_index_that_is_kept_serves_another_k(name: str) -> None:
    first = make_data(SHAPE, "cpu")[0]
    IMPLEMENTATIONS[name].prepare(first)()
    second = make_data(replace(SHAPE, k=90), "cpu")[0]
    assert second.key_set is first.key_set
    _, indices = IMPLEMENTATIONS[name].prepare(second)()
    assert indices.shape == (SHAPE.queries, 90)
    assert recall(second, (_, indices)) >= (LEAST_RECALL if name in EXACT else 0.9)


@pytest.mark.parametrize("name", ["faiss_sq_fp16", *OPTIONAL])
def test_a_rival_has_the_threads_it_is_given(name: str) -> None:
    """By the processor time of the calling thread among that of all: load changes nothing."""
    data = make_data(Shape(8, 40_000, 256, 10), "cpu")[0]
    shares = {}
    for count in (1, 2):
        with threads(count):
            run = IMPLEMENTATIONS[name].prepare(data)
            run()
            own, whole = time.thread_time(), time.process_time()
            for _ in range(4):
                run()
            own, whole = time.thread_time() - own, time.process_time() - whole
        shares[count] = 1 - own / whole
    assert shares[1] < 0.1, "one thread: the one that calls"
    assert shares[2] > 0.02, "two threads: another one works too"


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, package = OPTIONAL[name]
    monkeypatch.setitem(sys.modules, module, None)
    data = make_data(SHAPE, "cpu")[0]
    with pytest.raises(pytest.skip.Exception, match=f"{package} is not installed.*pip install"):
        IMPLEMENTATIONS[name].prepare(data)


def test_a_package_that_does_not_load_is_skipped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libsomething.so: cannot open shared object file")

    monkeypatch.setattr(needs, "import_module", broken)
    with pytest.raises(pytest.skip.Exception, match=r"a-package.*libsomething\.so"):
        needs.load("a_module", "a-package")


@pytest.mark.parametrize("queries", [1, 70])
def test_codes_give_the_very_bits_of_the_search(queries: int) -> None:
    data = make_data(replace(SHAPE, queries=queries), "cpu")[0]
    found = IMPLEMENTATIONS["knnext_codes"].prepare(data)()
    for theirs, ours in zip(found, IMPLEMENTATIONS["knnext"].prepare(data)(), strict=True):
        assert torch.equal(theirs, ours)


def test_what_is_not_exact_says_so() -> None:
    for name, chosen in IMPLEMENTATIONS.items():
        marked = name in (*APPROXIMATE, "faiss_ivfpq")
        assert chosen.approximate == marked, name
        assert not (marked and (chosen.exact or chosen.least_recall)), name
    for name in EXACT:
        assert IMPLEMENTATIONS[name].exact or IMPLEMENTATIONS[name].least_recall == 0.999, name


def test_kept_over_few_keys_and_built_anew_over_many(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = make_data(SHAPE, "cpu")[0].key_set
    built = []

    def build() -> int:
        built.append(1)
        return len(built)

    assert [keys.kept("a thing", build) for _ in range(3)] == [1, 1, 1]
    monkeypatch.setattr("benchmarks.data.search._KEPT_BYTES", 1000)
    assert [keys.kept("a thing", build) for _ in range(2)] == [2, 3]
