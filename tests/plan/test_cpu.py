"""SearchPlan: the CPU's sizes, and the statistics behind the GPU's starting threshold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from knnext import _host


def cpu_plan(
    queries: int, entries: int, dim: int, k: int, threads: int = 2, element_bytes: int = 2
):
    return _host.SearchPlan(
        queries=queries,
        entries=entries,
        dim=dim,
        k=k,
        element_bytes=element_bytes,
        num_units=threads,
    )


def test_kernel_is_the_vector_path_in_use() -> None:
    for queries, division in ((1, "sweep"), (8, "sweep"), (16, "keys"), (4096, "queries")):
        plan = cpu_plan(queries, 1 << 20, 128, 64)
        assert plan.kernel == f"cpu_{_host.cpu_isa()}_{division}"


def test_a_sweep_has_lists_alone_and_each_thread_its_own() -> None:
    plan = cpu_plan(8, 1 << 20, 4096, 1024, threads=16)
    assert plan.kernel.endswith("_sweep") and plan.num_passes == 1
    assert plan.workspace_bytes < 16 << 20
    # Where the lists would take more than that, threads share packed keys as ever.
    assert not cpu_plan(8, 1 << 30, 4096, 1 << 16, threads=16).kernel.endswith("_sweep")


@settings(max_examples=300, deadline=None)
@given(
    queries=st.integers(1, 200_000),
    entries=st.integers(1, 1 << 36),
    dim=st.integers(1, 20_000),
    k=st.integers(1, 100_000),
    threads=st.integers(1, 256),
)
def test_memory_stays_within_the_contract(queries, entries, dim, k, threads) -> None:
    plan = cpu_plan(queries, entries, dim, k, threads)
    per_query = max(128 << 10, 64 * k)
    assert 0 < plan.workspace_bytes <= (256 << 20) + queries * per_query
    assert 1 <= plan.queries_per_pass <= queries
    assert (plan.num_passes - 1) * plan.queries_per_pass < queries
    assert plan.num_passes * plan.queries_per_pass >= queries
    assert plan.bytes_read == plan.num_passes * entries * dim * 2
    assert plan.flop == pytest.approx(2.0 * queries * entries * dim)
    assert plan.threshold.capacity >= min(k, entries)
    assert plan.threshold.sample == 0  # the CPU draws none: it keeps running thresholds


def test_many_queries_are_searched_in_passes_of_bounded_memory() -> None:
    plan = cpu_plan(100_000, 1_000_000, 1024, 1024)
    assert plan.num_passes > 1 and plan.workspace_bytes < 256 << 20
    # Packing the keys again must stay a small part: a pass has work for it.
    assert plan.queries_per_pass >= 256


def test_queries_are_divided_evenly() -> None:
    for queries in (65, 100, 257, 1000, 5000):
        for threads in (2, 3, 8):
            plan = cpu_plan(queries, 100_000, 64, 10, threads)
            if plan.kernel.endswith("_queries"):
                tiles = math.ceil(queries / plan.query_tile)
                assert math.ceil(tiles / threads) * plan.query_tile < queries / threads + 9


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"queries": -1}, "queries and entries must be at least 0"),
        ({"dim": 0}, "dim and k at least 1"),
        ({"k": 0}, "dim and k at least 1"),
        ({"element_bytes": 3}, "element_bytes must be 2 or 4, got 3"),
    ],
)
def test_bad_problems_are_named(change: dict, match: str) -> None:
    problem = {"queries": 1, "entries": 10, "dim": 4, "k": 2, **change}
    with pytest.raises(ValueError, match=match):
        _host.SearchPlan(**problem)


def test_nothing_to_search() -> None:
    for queries, entries in ((0, 10), (10, 0), (0, 0)):
        plan = cpu_plan(queries, entries, 8, 3)
        assert plan.flop == 0 and plan.bytes_read == 0


def test_it_prints() -> None:
    assert repr(cpu_plan(4, 1000, 8, 3)).startswith("SearchPlan(kernel='cpu_")


# The threshold of a sample: the rank-th best of `sample` of `n` exchangeable keys. The number of
# keys it lets pass follows a negative hypergeometric law: with r - 1 sampled keys before it, the
# count of passing keys is below k just when more than r - 1 of the k best are in the sample.


@pytest.mark.parametrize("n", [100_000, 1_000_000, 10_000_000, 150_000_000])
@pytest.mark.parametrize("k", [1, 10, 100, 1024, 2048, 16384])
def test_threshold_passes_k_keys_and_fits_its_list(n: int, k: int) -> None:
    plan = _host.plan_threshold(num_keys=n, k=k)
    if plan.sample == 0:  # everything is a candidate
        assert plan.capacity == n
        return
    # Fewer than k pass: at least `rank` of the k best were sampled.
    too_few = stats.hypergeom(n, k - 1, plan.sample).sf(plan.rank - 1) if k > 1 else 0.0
    assert too_few < 1e-7
    # More than capacity pass: fewer than `rank` of the `capacity` best were sampled.
    too_many = stats.hypergeom(n, plan.capacity, plan.sample).cdf(plan.rank - 1)
    assert too_many < 1e-9
    assert k < plan.expected < plan.capacity < n


def test_threshold_against_draws() -> None:
    n, k, draws = 200_000, 50, 400
    plan = _host.plan_threshold(num_keys=n, k=k)
    generator = torch.Generator().manual_seed(3)
    passing = []
    for _ in range(draws):
        # The ranks of a random sample; the threshold's own rank among all keys is what passes.
        ranks = torch.randperm(n, generator=generator)[: plan.sample]
        passing.append(int(ranks.kthvalue(plan.rank).values) + 1)
    counts = torch.tensor(passing).double()
    assert counts.min() >= k and counts.max() <= plan.capacity
    assert abs(counts.mean() / plan.expected - 1) < 0.1
