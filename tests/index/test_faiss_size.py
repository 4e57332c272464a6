"""The size of a FAISS index from its factory string, against what FAISS writes."""

from __future__ import annotations

import numpy as np
import pytest

from knnext.index import faiss_library
from knnext.index.faiss_build import default_factory
from knnext.index.faiss_size import check_factory, faiss_size

ROWS, DIM = 4000, 32

FACTORIES = (
    *("Flat", "PQ8", "PQ8x4fs", "PQ4x6", "SQ8", "SQ4", "SQ6", "SQfp16", "SQbf16", "L2norm,Flat"),
    *("IVF16,Flat", "IVF16,PQ8", "IVF16,SQ8", "IVF32_HNSW8,PQ8", "IVF16,PQ16x4fs"),
    *("HNSW8", "HNSW4,Flat", "HNSW4,SQ8", "HNSW4_SQ8"),
    *("PCA16,IVF16,SQ8", "PCAR16,Flat", "RR16,PQ8", "IVF16,PQ8,RFlat", "Pad64,PQ8"),
)


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)


@pytest.mark.parametrize("factory", FACTORIES)
def test_it_is_what_faiss_writes(factory, keys, capfd):
    faiss = pytest.importorskip("faiss")
    index = faiss_library.create(factory, DIM, "l2")
    if not index.is_trained:
        for part in faiss_library._parts(index):
            for learner in (part, getattr(part, "pq", None)):
                if hasattr(learner, "cp"):
                    learner.cp.niter = 1
        index.train(keys[:1500])
    index.add(keys)
    written = len(faiss.serialize_index(index))
    size = faiss_size(factory, DIM)
    # Headers are some hundred bytes; links of a graph are drawn, and lists are filled unevenly.
    assert abs(size.index_bytes(ROWS) - written) <= 400 + 0.01 * written
    lists = faiss_library.num_lists(index)
    assert size.lists == lists
    assert size.graph == isinstance(faiss_library._inner(index), faiss.IndexHNSW)


def test_the_paper_s_index_has_its_bytes():
    """64 bytes of code and 8 of id for each of 153 million rows: the index of 11 GB."""
    size = check_factory("IVF4096,PQ64", 1024)
    assert (size.code_bytes, size.row_bytes, size.lists) == (64, 72, 4096)
    assert size.index_bytes(153_225_485) == pytest.approx(11.05e9, rel=0.01)
    assert size.build_bytes(10**6, 3) == 2 * size.index_bytes(10**6) + 3 * size.fixed_bytes


@pytest.mark.parametrize("rows", [5000, 10**5, 10**7, 10**9])
@pytest.mark.parametrize("dim", [1, 7, 96, 576, 1024, 4096])
def test_default_factories_are_known(rows, dim):
    assert faiss_size(default_factory(rows, dim), dim) is not None


@pytest.mark.parametrize(
    "factory",
    ["RQ8x8", "LSQ8x8", "NSG32", "IVF16", "PQ7", "IMI2x4,PQ8", "IVF16,HNSW8", "PQ8,nonsense", ""],
)
def test_what_is_not_known_is_refused_by_name(factory):
    assert faiss_size(factory, DIM) is None
    with pytest.raises(ValueError, match="not known before it is built; known are Flat, PQ64"):
        check_factory(factory, DIM)


def test_a_graph_s_spellings_are_one():
    assert faiss_size("HNSW", DIM) == faiss_size("HNSW32,Flat", DIM) == faiss_size("HNSW32", DIM)
    assert faiss_size("HNSW8_PQ8", DIM) == faiss_size("HNSW8,PQ8", DIM)
