"""The CUDA search's arithmetic: the statistics of its thresholds, and its memory, over a wide grid.

Keys are exchangeable in the model: the threshold is the rank-th best of a sample, and how many keys
pass it follows from drawing without replacement.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("knnext._host")
stats = pytest.importorskip("scipy.stats")

from knnext._host import SearchPlan, plan_cuda, plan_threshold, scan_crossovers  # noqa: E402

MIB = 1 << 20
SIZES = [8193, 9000, 20_000, 65_537, 100_000, 300_000, 10**6, 10**7, 1 << 24]
KS = [1, 2, 16, 64, 65, 256, 1024, 2048, 4096, 16384]
ALL_SIZES = [0, 1, 255, 4096, 8192, *SIZES, (1 << 24) + 1, 10**8, (1 << 31) - 1]
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def sampled() -> list[tuple[int, int, Any]]:
    cases = [(n, k, plan_threshold(n, k)) for n, k in itertools.product(SIZES, KS)]
    return [(n, k, t) for n, k, t in cases if t.sample]


def test_most_of_the_grid_is_sampled():
    assert len(sampled()) > 0.8 * len(SIZES) * len(KS)


def test_too_few_candidates_are_rare():
    # Fewer than k pass where `rank` of the sample lie among the k - 1 best.
    for n, k, t in sampled():
        shortage = stats.hypergeom.sf(t.rank - 1, n, k - 1, t.sample) if k > 1 else 0.0
        assert shortage < 1e-8, (n, k, t.rank, shortage)
        # And the binomial model of section 3 of the design, with S/N small.
        assert stats.binom.sf(t.rank - 1, k - 1, t.sample / n) < 2e-8


def test_overflowing_lists_are_rare():
    # More than `capacity` pass where fewer than `rank` of the sample lie among the best capacity.
    for n, k, t in sampled():
        overflow = stats.hypergeom.cdf(t.rank - 1, n, t.capacity, t.sample)
        assert overflow < 1e-9, (n, k, t.capacity, overflow)


def test_the_expected_number_of_candidates():
    for n, _, t in sampled():
        # The rank-th order statistic of a sample is a Beta quantile of the store.
        mean = n * stats.beta.mean(t.rank, t.sample - t.rank + 1)
        assert t.expected == pytest.approx(mean, rel=2e-3)
        assert t.expected < t.capacity < n


def test_few_thousand_candidates_for_a_thousand_neighbors():
    for n in (10**6, 10**7, 1 << 24):
        t = plan_threshold(n, 1024)
        assert 2000 < t.expected < 4200
        assert t.capacity < 8192


@pytest.mark.parametrize("n", ALL_SIZES)
def test_steps_lead_from_a_dense_sample_to_the_search(n: int):
    for k in KS:
        plan = plan_cuda(queries=64, entries=n, dim=64, k=k)
        steps = plan["steps"]
        assert steps[0]["dense"] and not any(s["dense"] for s in steps[1:])
        assert steps[-1]["rows"] == plan["chunk_keys"] and steps[-1]["wanted"] == k
        assert steps[-1]["strides"] == (1, 1)
        for step, following in itertools.pairwise(steps):
            assert step["wanted"] < step["rows"]
            # A row's place in the sample, times its strides, stays inside the chunk.
            near, far = step["strides"]
            assert step["rows"] * near * far <= plan["chunk_keys"]
            assert step["rows"] * near <= following["rows"]
        for step in steps:
            assert step["capacity"] <= plan["list_words"]
            assert min(step["wanted"], step["rows"]) <= step["capacity"] or step["rows"] == 0
        if len(steps) > 1:
            assert steps[0]["rows"] <= 1 << 14 or steps[0]["rows"] <= 2 * k


def test_chunks_cover_the_keys():
    for n in ALL_SIZES:
        plan = plan_cuda(queries=7, entries=n, dim=3, k=5)
        chunks, size = plan["num_chunks"], plan["chunk_keys"]
        assert size <= (1 << 24) + 256 and chunks * size >= n
        assert chunks == 1 or (chunks - 1) * size < n


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_memory_stays_within_the_contract(capability: tuple[int, int], element_bytes: int):
    grid = itertools.product(
        [0, 1, 16, 17, 64, 65, 4096, 16384, 100_000], ALL_SIZES, [1, 7, 65, 1024, 4096, 65536], KS
    )
    for queries, n, dim, k in grid:
        merged = 2 * k if n > 1 << 24 else 0
        plan = plan_cuda(
            queries=queries,
            entries=n,
            dim=dim,
            k=k,
            element_bytes=element_bytes,
            capability=capability,
            merge_columns=merged,
        )
        allowed = 256 * MIB + queries * max(128 << 10, 64 * k)
        what = (queries, n, dim, k, plan)
        assert plan["workspace_bytes"] <= allowed, what
        assert plan["queries_per_pass"] * plan["num_passes"] >= queries, what
        assert (plan["num_passes"] - 1) * plan["queries_per_pass"] < max(queries, 1), what
        assert plan["shared_bytes"] <= plan["shared_limit"], what
        assert plan["fallback_shared_bytes"] + 16384 <= plan["shared_limit"], what
        assert plan["owners"] >= 1 and plan["owner_words"] >= min(k, n) + 128, what
        assert plan["list_words"] >= min(k, n), what


def test_the_shape_follows_the_number_of_queries():
    def shape(queries: int, **more: Any) -> tuple[str, bool]:
        plan = plan_cuda(queries=queries, entries=10**6, dim=1024, k=1024, **more)
        return plan["shape"], plan["resident"]

    assert shape(1) == shape(16) == ("few", True)
    assert shape(17) == shape(64) == ("small", True)
    assert shape(65) == shape(16384) == ("large", False)
    assert shape(16384, element_bytes=4) == ("small", False)
    assert shape(64, capability=(8, 0)) == ("small", False)
    # With 99 KB of shared memory the tile of 64 queries still fits, of either element.
    assert shape(64, capability=(8, 6)) == shape(64, capability=(12, 0)) == ("small", False)
    assert shape(64, capability=(8, 9), element_bytes=4) == ("small", False)


# Which kernel scans


def scans_with(**problem: Any) -> str:
    sizes = {"queries": 16, "entries": 10**6, "dim": 1024, "k": 1024, "sm90": "1"} | problem
    return plan_cuda(**sizes)["kernel"]


def test_the_table_of_crossovers_is_complete_and_says_where_it_comes_from():
    table = scan_crossovers()
    for row in table:
        assert row["kernel"] in {"portable", "sm90_owner", "sm90_filter"}
        assert row["basis"] == "predicted" or row["basis"].startswith("measured on ")
        assert row["min_queries"] <= row["max_queries"] and row["reason"]
    last = table[-1]
    assert last["kernel"] == "portable"
    assert (last["min_queries"], last["min_keys"]) == (0, 0)
    assert last["max_queries"] == (1 << 63) - 1


@pytest.mark.parametrize("queries", [1, 8, 9, 64])
def test_few_queries_stay_in_shared_memory_and_read_each_key_once(queries: int):
    assert scans_with(queries=queries) == "sm90_owner"
    plan = plan_cuda(queries=queries, entries=10**6, dim=1024, k=1024, sm90="1")
    assert plan["num_passes"] == 1 and plan["because"].startswith("predicted: ")


@pytest.mark.parametrize("queries", [65, 128, 192, 193, 16384])
def test_more_queries_are_filtered_by_tiles(queries: int):
    assert scans_with(queries=queries) == "sm90_filter"


def test_few_keys_go_the_plain_way():
    assert scans_with(entries=16383) == scans_with(entries=16383, queries=300) == "portable"
    assert scans_with(entries=16384) == "sm90_owner"
    assert scans_with(entries=65535, queries=300) == "portable"
    assert scans_with(entries=65536, queries=300) == "sm90_filter"
    assert scans_with(entries=16383, sm90="all") == "sm90_owner"
    assert scans_with(entries=65535, queries=300, sm90="all") == "sm90_filter"
    assert scans_with(entries=0) == scans_with(queries=0) == "portable"


def test_queries_too_wide_to_stay_are_not_split():
    assert scans_with(queries=64, dim=1280) == "sm90_owner"
    assert scans_with(queries=64, dim=1288) == "sm90_filter"
    assert scans_with(queries=32, dim=2560) == scans_with(queries=16, dim=5120) == "sm90_owner"
    assert scans_with(queries=16, dim=5128) == "portable"


@pytest.mark.parametrize("queries", [16, 300])
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ({"sm90": "0"}, "with KNNEXT_SM90=1 it would be sm90_"),
        ({"element_bytes": 4}, "float16 and bfloat16"),
        ({"dim": 1001}, "dim % 8 == 0"),
        ({"aligned": False}, "multiples of 16 bytes"),
        ({"capability": (8, 0)}, "compute capability 9.0"),
        ({"capability": (10, 0)}, "compute capability 9.0"),
    ],
)
def test_what_hopper_kernels_cannot_do_is_portable_and_said(
    queries: int, problem: dict[str, Any], reason: str
):
    sizes = {"entries": 10**6, "dim": 1024, "k": 1024, "sm90": "1"} | problem
    plan = plan_cuda(queries=queries, **sizes)
    assert plan["kernel"] == "portable"
    assert reason in plan["because"]


def test_the_switch_is_an_environment_variable(monkeypatch: pytest.MonkeyPatch):
    from knnext._host import build_info

    built = "9.0a" in build_info()["cuda_archs"]
    for value, kernel in (("1", "sm90_owner" if built else "portable"), ("0", "portable")):
        monkeypatch.setenv("KNNEXT_SM90", value)
        assert scans_with(sm90=None) == kernel
    monkeypatch.delenv("KNNEXT_SM90")
    assert scans_with(sm90=None) == "portable"


def test_the_owner_kernel_fits_and_keeps_enough_keys_under_way():
    for queries, dim in itertools.product([1, 8, 9, 16, 17, 32, 33, 64], range(8, 12000, 8)):
        plan = plan_cuda(queries=queries, entries=10**6, dim=dim, k=16, sm90="1")
        tile, stages = plan["owner_query_tile"], plan["owner_stages"]
        assert tile >= queries and (tile == 8 or tile < 2 * queries)
        if plan["kernel"] != "sm90_owner":
            assert stages == 0 and tile * dim > 64 * 1280
            continue
        assert 4 <= stages <= 13
        rows = tile * -(-dim // 64) * 128 + stages * 128 * 128
        # Candidates, two barriers a stage, and room to align the tiles.
        needed = rows + 2048 + 16 * stages + 896
        assert needed <= plan["owner_shared_bytes"] <= plan["shared_limit"]
    assert plan_cuda(queries=64, entries=10**6, dim=1024, k=16, sm90="1")["owner_stages"] == 6
    assert plan_cuda(queries=1, entries=10**6, dim=1024, k=16, sm90="1")["owner_stages"] == 12


def test_large_searches_take_few_passes():
    plan = plan_cuda(queries=16384, entries=10**7, dim=1024, k=1024)
    assert plan["num_passes"] == 1
    assert plan_cuda(queries=16384, entries=10**7, dim=1024, k=16384)["num_passes"] == 1


def test_the_public_plan_is_the_same_plan():
    inner = plan_cuda(queries=64, entries=10**6, dim=1024, k=1024)
    plan = SearchPlan(queries=64, entries=10**6, dim=1024, k=1024, capability=(9, 0), num_units=132)
    assert plan.kernel == "cuda_mma_small_resident"
    assert (plan.query_tile, plan.key_tile, plan.dim_tile) == (64, 256, 32)
    assert plan.workspace_bytes == inner["workspace_bytes"]
    assert plan.threshold.rank == inner["steps"][-2]["wanted"]
    assert plan.bytes_read == 10**6 * 2048


@pytest.mark.parametrize(
    ("queries", "kernel", "tiles"),
    [(20, "cuda_sm90_owner", (32, 128, 64)), (256, "cuda_sm90_filter", (128, 256, 64))],
)
def test_the_public_plan_names_the_kernel_and_why(
    queries: int, kernel: str, tiles: tuple[int, int, int]
):
    sizes = {"queries": queries, "entries": 10**6, "dim": 1024, "k": 1024}
    plan = SearchPlan(**sizes, capability=(9, 0), num_units=132, sm90="1")
    assert plan.kernel == kernel and plan.because.startswith("predicted: ")
    assert (plan.query_tile, plan.key_tile, plan.dim_tile) == tiles
    assert SearchPlan(**sizes).because == ""


@pytest.mark.parametrize("bad", [{"k": 0}, {"dim": 0}, {"queries": -1}, {"element_bytes": 3}])
def test_a_senseless_problem_is_refused(bad: dict[str, int]):
    sizes = {"queries": 1, "entries": 10, "dim": 4, "k": 2} | bad
    with pytest.raises(ValueError, match="SearchPlan"):
        SearchPlan(**sizes, capability=(9, 0), num_units=132)
