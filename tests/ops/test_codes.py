"""knn_search by codes gives the bits of knn_search, whatever the keys, codes and options."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import knnext
from knnext import KeyCodes, _host
from knnext.testing import assert_equal_results
from tests.ops.mixing_cases import run_python, threads
from tests.ops.test_knn_search_refine import CLOUDS

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
METRICS = ["l2", "ip"]
FORMS = list(itertools.product(METRICS, [False, True]))


def assert_same(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str = "l2",
    codes: KeyCodes | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    codes = knnext.encode_keys(keys) if codes is None else codes
    want = knnext.knn_search(queries, keys, k, metric, **options)
    got = knnext.knn_search(queries, keys, k, metric, codes=codes, **options)
    assert_equal_results(got, want)
    return got


def near(keys: Tensor, count: int, spread: float = 0.5) -> Tensor:
    """Queries near some of the keys, a few of them the keys themselves."""
    rows = keys[torch.randint(0, len(keys), (count,))]
    moved = rows.float() + spread * torch.randn(rows.shape)
    return torch.where((torch.arange(count) % 5 == 3)[:, None], rows.float(), moved).to(keys.dtype)


# What every vector path is asked; those that are not the process's own, in children


def shapes() -> None:
    for dim, dtype, (metric, refine) in zip(
        (1, 3, 7, 64, 65, 576, 1600, 4096), itertools.cycle(DTYPES), itertools.cycle(FORMS)
    ):  # fmt: skip
        keys = (3 + torch.randn(600 if dim > 500 else 2003, dim)).to(dtype)
        codes = knnext.encode_keys(keys)
        for form in FORMS if dim in (7, 65) else [(metric, refine)]:
            for count in (1, 5, 17):
                assert_same(near(keys, count), keys, 9, form[0], codes, refine=form[1])


def edges() -> None:
    """Numbers of keys about the edges of panels and tiles, with every number of queries a tile."""
    for count in (37, 40, 41, 47, 48, 49, 95, 96, 97, 191, 193, 385):
        keys = torch.randn(count, 10) + 1
        codes = knnext.encode_keys(keys)
        for queries in (1, 4, 6, 8, 9, 17):
            assert_same(near(keys, queries), keys, 5, "l2", codes)
        assert_same(near(keys, 7), keys, 5, "ip", codes, refine=True)


def numbers_of_queries() -> None:
    """Those of one pass, of a pilot, and of what follows it with a sample of the keys."""
    keys = (torch.randn(12_000, 24) * torch.rand(24) + 2).half()
    codes = knnext.encode_keys(keys)
    for count, (metric, refine) in zip((5, 7, 95, 96, 383, 384, 400, 900), itertools.cycle(FORMS)):
        assert_same(near(keys, count), keys, 30, metric, codes, refine=refine)
    for metric, refine in FORMS:
        assert_same(near(keys, 400), keys, 30, metric, codes, refine=refine)


def ranks() -> None:
    keys = torch.randn(5000, 16) + 4
    codes = knnext.encode_keys(keys)
    for k in (1, 2, 64, 65, 1024, 1025, 1249, 1250, 1251, 4999, 5000, 5001):
        assert_same(near(keys, 6), keys, k, "l2", codes)


def given() -> None:
    """Keys in chunks, each going on from the last; one chunk holds nothing that is nearer."""
    for dtype, (metric, refine) in itertools.product((torch.float16, torch.float32), FORMS):
        keys = (torch.randn(3000, 20) + 1).to(dtype)
        keys[2000:2300] = keys[:300]  # again, with higher indices: ties
        keys[1200:1500] += 1000.0
        queries, codes = near(keys, 40), knnext.encode_keys(keys)
        carried: dict[str, Tensor] = {}
        for start, stop in itertools.pairwise((0, 700, 1200, 1500, 2999, 3000)):
            norms = knnext.key_sqnorms(keys[start:stop]) if start else None
            d, i = assert_same(
                queries, keys[start:stop], 25, metric, codes[start:stop], refine=refine,
                key_sqnorms=norms, index_offset=start, **carried,
            )  # fmt: skip
            carried = {"init_distances": d, "init_indices": i}
        assert_equal_results((d, i), knnext.knn_search(queries, keys, 25, metric, refine=refine))


def traps() -> None:
    for make, (metric, refine) in itertools.product(TRAPS.values(), FORMS):
        keys = make(2500, 33)
        queries = near(keys, 20, 0.1)
        queries[:3] = make(3, 33)
        assert_same(queries, keys, 20, metric, refine=refine)


PARTS: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (shapes, edges, numbers_of_queries, ranks, given, traps)
}


# Keys that have broken searches


def two_clusters(n: int, dim: int) -> Tensor:
    keys = torch.randn(n, dim)
    keys[n // 2 :] += 1e4
    return keys


def in_order(n: int, dim: int) -> Tensor:
    return (torch.arange(n)[:, None] / 8.0).expand(n, dim) + 0.01 * torch.randn(n, dim)


def with_one(value: float) -> Callable[[int, int], Tensor]:
    def make(n: int, dim: int) -> Tensor:
        keys = torch.randn(n, dim)
        keys[n // 2] = value
        keys[::7, dim // 2] = value
        return keys

    return make


def near_duplicates(n: int, dim: int) -> Tensor:
    keys = torch.randn(n, dim)
    keys[n // 2 :] = keys[: n - n // 2] * (1 + (torch.rand(n - n // 2, 1) < 0.5) * 2.0**-22)
    return keys


TRAPS: dict[str, Callable[[int, int], Tensor]] = {
    **CLOUDS,
    "all equal": lambda n, d: torch.randn(1, d).repeat(n, 1),
    "zero": lambda n, d: torch.zeros(n, d),
    "two clusters": two_clusters,
    "in order": in_order,
    "zero rows": lambda n, d: torch.randn(n, d) * (torch.arange(n) % 3 > 0)[:, None],
    "largest half": lambda n, d: ((torch.randint(0, 2, (n, d)) * 2 - 1) * 65504.0).half(),
    "smallest half": lambda n, d: ((torch.randint(0, 2, (n, d)) * 2 - 1) * 2.0**-24).half(),
    "bfloat16 far": lambda n, d: (100 + 0.5 * torch.randn(n, d)).bfloat16(),
    "NaN": with_one(NAN),
    "infinite": with_one(INF),
    "nothing finite": lambda n, d: torch.full((n, d), NAN),
    "one huge key": lambda n, d: torch.randn(n, d) * (1 + 1e15 * (torch.arange(n) == 9))[:, None],
    "a few 1e20": lambda n, d: torch.randn(n, d) * 1e20 ** (torch.arange(n) % 50 == 9)[:, None],
    "near the end of float32": lambda n, d: torch.randn(n, d) * 5e37,
    "one huge dimension": lambda n, d: torch.randn(n, d) + 1e4 * torch.eye(1, d),
    "near duplicates": near_duplicates,
}  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("part", PARTS)
def test_the_same_bits(part: str, count: int) -> None:
    with threads(count):
        PARTS[part]()


@pytest.mark.slow
@pytest.mark.parametrize("path", _host.build_info()["vector_paths"])
def test_the_same_bits_on_every_vector_path(path: str) -> None:
    if path not in _host.usable_cpu_isas():
        pytest.skip(f"this processor has no {path}")
    code = (
        "import torch; from tests.ops.test_codes import PARTS, threads\n"
        "for count in (1, 2):\n"
        "    with threads(count):\n"
        "        for part in PARTS.values():\n"
        "            torch.manual_seed(0); part()\n"
    )
    run_python(code, KNNEXT_CPU_ISA=path)


@pytest.fixture(scope="module")
def disassembled() -> str:
    """The library, a paragraph for each function."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    if "avx512_vnni" not in _host.build_info()["vector_paths"]:
        pytest.skip("not built for x86-64")
    library = Path(knnext.__file__).parent / "lib" / "libknnext_cpu.so"
    return subprocess.run(
        ["objdump", "-dC", library], capture_output=True, text=True, check=True
    ).stdout


def test_the_library_multiplies_bytes_where_the_processor_does(disassembled: str) -> None:
    used = [line for line in disassembled.splitlines() if "vpdpbusd" in line]
    assert [line for line in used if "zmm" in line], "AVX-512 VNNI"
    assert [line for line in used if "{vex}" in line and "ymm" in line], "AVX-VNNI"


def test_rows_that_are_scored_again_are_asked_for_ahead(disassembled: str) -> None:
    """A compiler may drop that, in silence: it changes no result."""
    functions = disassembled.split("\n\n")
    scoring = [f for f in functions if "<knnext::cpu::Rescoring::score" in f[:99]]
    assert sum(f.count("prefetch") for f in scoring) >= 2, "by either form"


@pytest.mark.parametrize("name", ["in order", "all equal", "two clusters", "near duplicates"])
def test_a_sample_that_says_little_costs_only_time(name: str) -> None:
    """Hundreds of queries, so that a sample of the keys sets thresholds that do not hold."""
    keys = TRAPS[name](9000, 12)
    for metric, refine in FORMS:
        assert_same(near(keys, 420, 0.05), keys, 40, metric, refine=refine)


def test_keys_near_to_the_queries_only_between_the_panels_of_a_sample() -> None:
    keys = torch.randn(8000, 8) + 5
    keys[100:140] = 0.01 * torch.randn(40, 8)
    queries = torch.cat([near(keys[200:], 200), 0.01 * torch.randn(300, 8)])
    assert_same(queries, keys, 30)
    assert_same(queries.flip(0).contiguous(), keys, 30)


@pytest.mark.parametrize(
    "center",
    [
        torch.full((33,), 1e4),
        torch.full((33,), 1e30),
        torch.full((33,), -3e38),
        torch.full((33,), NAN),
        torch.full((33,), INF),
        torch.full((33,), 1e-42),
        torch.zeros(33),
    ],
    ids=["far", "1e30", "the end of float32", "NaN", "infinite", "subnormal", "zero"],
)
def test_any_center_is_right(center: Tensor) -> None:
    keys = torch.randn(3000, 33) + 2
    for metric, refine in FORMS:
        codes = knnext.encode_keys(keys, center)
        assert_same(near(keys, 30), keys, 20, metric, codes, refine=refine)


def test_the_center_among_the_keys() -> None:
    keys = torch.randn(2000, 33)
    keys[::3] = keys[0]
    codes = knnext.encode_keys(keys, keys[0].clone())
    assert (codes.codes[::3] == 0).all() and (codes.stats[::3, ::2] == 0).all()
    for metric, refine in FORMS:
        assert_same(torch.cat([keys[:3], near(keys, 9)]), keys, 30, metric, codes, refine=refine)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("refine", [False, True])
def test_queries_that_are_not_finite_or_huge_leave_the_others_alone(
    metric: str, refine: bool
) -> None:
    keys = torch.randn(3000, 33)
    queries = near(keys, 60)
    queries[3, 4], queries[9, 0], queries[11] = NAN, INF, 1e30
    queries[13], queries[17] = 3e38, 1e-42
    given = {"init_distances": torch.rand(60, 4), "init_indices": torch.randint(-1, 9, (60, 4))}
    for kwargs in ({}, given):
        assert_same(queries, keys, 4, metric, refine=refine, **kwargs)


def test_given_distances_may_be_anything() -> None:
    keys = torch.randn(2000, 9) * 10
    queries = near(keys, 12)
    queries[6:] *= 1e18
    keys[::40] *= 1e18  # products near the end of float32, and past it
    given = torch.tensor([-INF, -3.4e38, -3.2e38, -1.0, 0.0, 1e-45, 3.0, 3e38, INF, NAN, 5.0, -0.0])
    for metric, refine in FORMS:
        assert_same(
            queries, keys, 2, metric, refine=refine,
            init_distances=given[:, None].expand(12, 2),
            init_indices=torch.tensor([[7, 5000]]).expand(12, 2),
        )  # fmt: skip


def test_duplicates_come_with_the_lower_index_first() -> None:
    keys = torch.randn(50, 40)[torch.randint(0, 50, (6000,))] + 100
    distances, indices = assert_same(keys[:50], keys, 200, refine=True)
    for q in range(0, 50, 7):
        same = (keys == keys[q]).all(1).nonzero().flatten()[:200]
        assert torch.equal(indices[q, : len(same)], same)
        assert (distances[q, : len(same)] == 0).all()


@pytest.mark.parametrize("count", [1, 2])
def test_where_subnormals_are_taken_for_zero(count: int) -> None:
    """By this thread, which is one of two."""
    torch.set_flush_denormal(True)
    try:
        for name in ("all equal", "duplicates", "zero", "subnormal", "near 1e-30", "scales"):
            keys = TRAPS[name](6000, 12)
            for metric, refine in FORMS:
                with threads(count):
                    assert_same(near(keys, 400, 1e-3), keys, 30, metric, refine=refine)
    finally:
        torch.set_flush_denormal(False)


def test_tensors_of_any_strides() -> None:
    keys = (torch.randn(2000, 80) + 1)[:, ::2]
    queries = near(keys, 30).T.contiguous().T
    codes = knnext.encode_keys(keys)
    apart = KeyCodes(
        codes.codes.T.contiguous().T, codes.stats.repeat(1, 2)[:, :3], codes.center.repeat(2)[:40]
    )
    wide = KeyCodes(
        torch.stack([codes.codes] * 2, 2)[:, :, 1],
        torch.stack([codes.stats] * 2, 2)[:, :, 0],
        torch.stack([codes.center] * 2, 1)[:, 1],
    )
    want = knnext.knn_search(queries, keys, 12)
    for given in (codes, apart, wide):
        assert_equal_results(knnext.knn_search(queries, keys, 12, codes=given), want)
    norms = torch.stack([knnext.key_sqnorms(keys)] * 2, 1)[:, 0]
    assert_same(queries, keys, 12, "l2", wide, key_sqnorms=norms)


def test_dimensions_past_what_sums_of_bytes_hold() -> None:
    for dim in ((1 << 17) - 1, 1 << 17, (1 << 17) + 3):
        keys = torch.randn(40, dim) * 3
        keys[0], keys[1] = 5.0, -5.0
        for metric, refine in FORMS[::3]:
            assert_same(keys[:3] + 0.1, keys, 4, metric, refine=refine)


@pytest.mark.parametrize(("rows", "count"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_search(rows: int, count: int) -> None:
    keys = torch.randn(count, 6)
    distances, indices = assert_same(torch.randn(rows, 6), keys, 3)
    assert distances.shape == indices.shape == (rows, 3) and (indices == -1).all()


def test_codes_of_other_keys_end_all_the_same() -> None:
    """The caller's error; whatever is returned are rows of these keys with their own distances."""
    keys, others = torch.randn(4000, 33), knnext.encode_keys(100 * torch.rand(4000, 33))
    queries = near(keys, 30)
    distances, indices = knnext.knn_search(queries, keys, 20, codes=others)
    assert ((indices >= -1) & (indices < 4000)).all()
    real = indices >= 0
    torch.testing.assert_close(
        distances[real], knnext.rescore(queries, keys, indices)[real], rtol=1e-4, atol=1e-4
    )


def test_the_same_bits_at_a_hundred_thousand_keys() -> None:
    basis = torch.randn(8, 64)
    keys = (torch.randn(100_000, 8) @ basis + 0.1 * torch.randn(100_000, 64) + 3).half()
    codes = knnext.encode_keys(keys)
    for count, metric in ((1, "l2"), (400, "ip"), (400, "l2")):
        assert_same(near(keys, count), keys, 100, metric, codes)
