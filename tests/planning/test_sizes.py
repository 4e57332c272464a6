"""Bytes of a plan: those that are written, what fits where, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from knnext.datastore import Datastore
from knnext.index import FaissIndex, StoredCodes
from knnext.planning import make_plan
from knnext.planning.job import Job
from knnext.planning.model_shape import described
from knnext.planning.placement import (
    CODES_RESIDENT,
    CODES_STREAMED,
    FROM_DISK,
    FROM_MEMORY,
    RESIDENT,
    place,
    usual_batch,
)
from tests.planning.jobs import PAPER, job, machine, rates

ROWS, DIM = 3000, 48


def folder_bytes(folder: Path, names: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(names))


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def store(request, tmp_path_factory) -> Datastore:
    path = tmp_path_factory.mktemp("sizes") / "store"
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, request.param)
    with Datastore.create(path, DIM, dtype, key_layer="att") as made:
        made.append(torch.randn(ROWS, DIM, generator=generator).to(dtype), torch.zeros(ROWS).long())
    return Datastore.open(path)


def job_of(store: Datastore, **changes) -> Job:
    dtype = str(store.dtype).removeprefix("torch.")
    return Job(ROWS, described(DIM, 1, None), dtype=dtype, **changes)


def test_a_datastore_and_its_codes_have_the_planned_bytes(store):
    found = job_of(store, codes=True).disk()
    assert found["datastore"] == folder_bytes(Path(store.path), "*.bin")
    codes = StoredCodes.build(store)
    assert found["codes"] == folder_bytes(codes.path, "*.bin") == codes.nbytes


def test_an_index_has_the_planned_bytes(store):
    pytest.importorskip("faiss")
    planned = job_of(store, index="default").disk()
    built = FaissIndex.build(store)
    assert built.factory == job_of(store, index="default").factory == "Flat"
    assert abs(built.num_bytes - planned["index"]) < 400


def test_the_paper_s_datastore():
    """Of the specification: 230.9 GB of keys, and codes that fit one H200 where keys do not."""
    assert PAPER.disk()["datastore"] == 112_733_184 * (2048 + 4)
    found = rates()
    assert place(PAPER, found.machine).tier == FROM_MEMORY
    assert make_plan(PAPER, found).resident_ranks == 2
    assert place(job(gpus=2), found.machine).tier == RESIDENT
    assert 112_733_184 * PAPER.code_bytes < found.machine.gpu_memory


@pytest.mark.parametrize(
    ("changes", "memory", "tier"),
    [
        ({"gpus": 0}, 512 << 30, RESIDENT),
        ({"gpus": 0}, 200 << 30, FROM_DISK),
        ({"gpus": 0, "codes": True}, 512 << 30, RESIDENT),
        ({"gpus": 0, "codes": True}, 200 << 30, CODES_RESIDENT),
        ({"gpus": 0, "codes": True}, 100 << 30, CODES_STREAMED),
        ({"gpus": 0, "codes": True, "nodes": 4}, 100 << 30, RESIDENT),
        ({"gpus": 1}, 200 << 30, FROM_DISK),
        ({"gpus": 1, "codes": True}, 2 << 40, FROM_MEMORY),
    ],
)
def test_where_rows_lie(changes, memory, tier):
    found = machine(rates("cpu" if not changes["gpus"] else "h200"), memory=memory)
    where = place(job(**changes), found.machine)
    assert where.tier == tier
    assert where.resident == (tier in (RESIDENT, CODES_RESIDENT))
    assert where.held <= where.budget
    assert (where.held > 0) == where.resident


def test_more_ranks_never_stream_what_fewer_kept():
    found, before = rates(), False
    for nodes in (1, 2, 3, 5, 8, 13):
        now = place(job(tokens=10**9, gpus=8, nodes=nodes), found.machine).resident
        assert now or not before
        before = now
    plan = make_plan(job(tokens=10**9, gpus=8), found)
    assert plan.resident_ranks is not None and plan.resident_ranks % 8 == 0
    nodes = plan.resident_ranks // 8
    assert place(job(tokens=10**9, gpus=8, nodes=nodes), found.machine).resident
    assert not place(job(tokens=10**9, gpus=8, nodes=nodes - 1), found.machine).resident


# Refusals


@pytest.mark.parametrize("free", [10**9, 10**10, 123_456_789_012])
@pytest.mark.parametrize("changes", [{}, {"codes": True}, {"index": "IVF4096,PQ64"}])
def test_a_small_disk_is_refused_with_what_would_fit(free, changes):
    plan = make_plan(job(**changes), rates(), free=free)
    assert not plan.fits and len(plan.refusals) == 1
    most = int(plan.refusals[0].partition("; ")[2].split()[0].replace(",", ""))
    assert sum(job(tokens=most, **changes).disk().values()) <= free
    assert sum(job(tokens=most + 1, **changes).disk().values()) > free
    assert make_plan(job(tokens=most, **changes), rates(), free=free).fits


def test_what_is_lighter_is_named():
    plan = make_plan(job(dtype="float32"), rates(), free=300 * 10**9)
    assert plan.refusals[0].endswith("or all of it with --key-dtype float16")
    plan = make_plan(job(codes=True), rates(), free=300 * 10**9)
    assert plan.refusals[0].endswith("or all of it without codes")
    plan = make_plan(job(), rates(), free=1)
    assert "not even one token would fit" in plan.refusals[0]


def test_a_model_larger_than_a_gpu_is_refused():
    large = job(shape=described(8192, 80, 70e9))
    plan = make_plan(large, machine(rates("a100"), gpu_memory=80 * 10**9))
    assert "the model takes" in plan.refusals[0] and "of a GPU's" in plan.refusals[0]
    assert "parameters would fit" in plan.refusals[0]
    assert make_plan(replace(large, shape=described(4096, 32, 7e9)), rates("a100")).fits


def test_a_batch_is_as_build_chooses_it():
    found = rates()
    assert usual_batch(job(), found.machine).batch == 32_768 // 1024
    assert usual_batch(job(gpus=0), found.machine).batch == 8192 // 1024
    tight = job(shape=described(8192, 76, 62e9))  # 124 GB of weights
    batch = usual_batch(tight, found.machine).batch
    assert 1 <= batch < 32 and make_plan(usual_batch(tight, found.machine), found).fits


def test_a_batch_larger_than_a_gpu_is_refused():
    plan = make_plan(job(shape=described(4096, 32, 7e9), batch=10**5), rates())
    assert "--batch-size 1 would fit" in plan.refusals[0]


def test_an_index_larger_than_memory_is_refused():
    plan = make_plan(job(index="HNSW32"), machine(rates(), memory=64 * 10**9))
    assert "the FAISS index HNSW32 takes" in plan.refusals[0]
    assert "tokens would fit" in plan.refusals[0]
    assert make_plan(job(index="IVF4096,PQ64"), machine(rates(), memory=64 * 10**9)).fits


def test_streaming_is_refused_where_rows_must_stay():
    assert make_plan(job(), rates()).fits
    plan = make_plan(job(), rates(), must_stay=True)
    assert "2 ranks would hold all" in plan.refusals[0]
    most = int(plan.refusals[0].rpartition(" tokens")[0].rpartition("; ")[2].replace(",", ""))
    assert place(job(tokens=most), rates().machine).resident
    assert not place(job(tokens=most + 1), rates().machine).resident


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"k": 20_000}, "k must be at most 16,384 on GPUs"),
        ({"gpus": -1}, "gpus must be 0 or more"),
        ({"stride": 2048}, "stride must be at most block=1024"),
        ({"dtype": "int8"}, "dtype"),
        ({"index": "LSQ8x8"}, "known are Flat, PQ64"),
    ],
)
def test_jobs_that_are_none(changes, named):
    with pytest.raises(ValueError, match=named):
        job(**changes)


def test_notes():
    def notes(**changes) -> str:
        return " ".join(make_plan(job(**changes), rates()).notes)

    assert "leaves codes aside" in notes(codes=True)
    assert "resident_bytes=" in notes(gpus=2)
    assert "the rest of each answer is padding" in notes(tokens=1000)
    assert "FAISS wants 39 a list" in notes(index="IVF65536,PQ64", tokens=200_000)
