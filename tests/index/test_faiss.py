"""FaissIndex: conventions, real scores, exclusion, factories and samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from knnext.datastore import Datastore
from knnext.index import ExactIndex, FaissIndex, check_exactness
from knnext.index.faiss_build import default_factory, sample_rows
from tests.index.stores import ROWS, clustered, make_datastore

faiss = pytest.importorskip("faiss")
pytestmark = pytest.mark.usefixtures("one_thread")

# Every kind of index that the search treats in its own way.
FACTORIES = [
    "Flat",
    "IVF16,Flat",
    "IVF16,PQ16x4",
    "RR32,IVF16,PQ16x4",
    "SQ8",
    "HNSW16",
    "IVF16,PQ16x4,RFlat",
    "IVF16,PQ8",
]


@pytest.fixture(scope="module")
def indexes(
    stores: dict[str, Datastore], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], FaissIndex]:
    folder = tmp_path_factory.mktemp("indexes")
    return {
        (factory, metric): FaissIndex.build(
            store, folder / f"{number}-{metric}", factory, segment_rows=700, add_chunk=300
        )
        for number, factory in enumerate(FACTORIES)
        for metric, store in stores.items()
    }


@pytest.fixture
def queries() -> Tensor:
    return clustered(60, seed=7, dtype=torch.float32)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("factory", FACTORIES)
def test_conventions(
    indexes: dict[tuple[str, str], FaissIndex], queries: Tensor, factory: str, metric: str
) -> None:
    """Smaller is nearer, sorted by (distance, index), ids are rows, nothing twice."""
    index = indexes[factory, metric]
    distances, indices = index.search(queries, 20, nprobe=16)
    assert distances.shape == indices.shape == (60, 20)
    assert distances.dtype == torch.float32 and indices.dtype == torch.int64
    assert ((indices >= 0) & (indices < ROWS)).all()
    later = distances[:, 1:] > distances[:, :-1]
    tied = (distances[:, 1:] == distances[:, :-1]) & (indices[:, 1:] > indices[:, :-1])
    assert (later | tied).all()
    exact, best = ExactIndex(index.datastore).search(queries, 20)
    recall = torch.stack([torch.isin(a, b) for a, b in zip(best, indices, strict=True)])
    assert recall.float().mean() > 0.5
    # The scores stand for the same thing as those of the exact index, coarse codes or not.
    scale = exact.abs().mean()
    assert (distances - exact).abs().mean() < 0.35 * scale


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_flat_is_exact(
    indexes: dict[tuple[str, str], FaissIndex], queries: Tensor, metric: str
) -> None:
    index = indexes["Flat", metric]
    assert check_exactness(index, queries, 50, sample=30).exact
    want, _ = ExactIndex(index.datastore).search(queries, 50)
    distances, _ = index.search(queries, 50)
    torch.testing.assert_close(distances, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("factory", ["IVF16,PQ16x4", "RR32,IVF16,PQ16x4"])
def test_rescore_keeps_the_mask_and_gives_real_distances(
    indexes: dict[tuple[str, str], FaissIndex], queries: Tensor, factory: str, metric: str
) -> None:
    index = indexes[factory, metric]
    _, mask = index.search(queries, 40)
    distances, indices = index.search(queries, 40, rescore=True)
    assert torch.equal(indices.sort().values, mask.sort().values)
    keys, q = index.datastore.keys[:].double(), queries.half().double()
    diff = keys[indices] - q[:, None]
    real = diff.square().sum(-1) if metric == "l2" else -(keys[indices] @ q[:, :, None])[..., 0]
    torch.testing.assert_close(distances.double(), real, rtol=1e-5, atol=1e-4)
    assert (distances.diff(dim=1) >= 0).all()
    # One query at a time, as little memory as there is, gives the same.
    small = FaissIndex.open(index.path, index.datastore, gather_bytes=1, rescore=True)
    again = small.search(queries, 40)
    assert torch.equal(again[0], distances) and torch.equal(again[1], indices)


def test_missing_neighbors_are_padding(
    indexes: dict[tuple[str, str], FaissIndex], queries: Tensor
) -> None:
    """FAISS marks them -1 with a huge number: they must come out at +inf, last, and stay so."""
    index = indexes["IVF16,PQ16x4", "l2"]
    for rescore in (False, True):
        distances, indices = index.search(queries, 2000, nprobe=1, rescore=rescore)
        padding = indices < 0
        assert padding.any(1).all() and not padding[:, 0].any()
        assert distances[padding].isinf().all() and distances[~padding].isfinite().all()
        assert (padding.int().diff(dim=1) >= 0).all()
        assert (index.tokens(indices)[padding] == -1).all()
    distances, indices = indexes["IVF16,PQ16x4", "ip"].search(queries, 2000, nprobe=1)
    assert (distances[indices < 0] == float("inf")).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("factory", FACTORIES)
def test_excluded_documents(
    indexes: dict[tuple[str, str], FaissIndex], queries: Tensor, factory: str, metric: str
) -> None:
    """As if the rows were not in the lists: the full ranking with those rows struck out."""
    index = indexes[factory, metric]
    excluded = torch.arange(60) % 7 - 1
    distances, indices = index.search(queries, 30, excluded, nprobe=4)
    documents = index.datastore.document_of(indices)
    assert not ((documents == excluded[:, None]) & (excluded[:, None] >= 0)).any()
    if factory == "HNSW16":
        return  # a graph walk has no full ranking to compare with
    everything = index.search(queries, ROWS, nprobe=4)
    for q in range(60):
        keep = everything[1][q] >= 0
        if excluded[q] >= 0:
            keep &= index.datastore.document_of(everything[1][q]) != excluded[q]
        rows, found = everything[1][q][keep], indices[q][indices[q] >= 0]
        assert torch.isin(found, rows).all() and found.unique().numel() == found.numel()
        if not factory.endswith("RFlat"):  # what refining sees depends on k
            # Codes tie or nearly so, and their order may then turn: distances tell the rank.
            want = everything[0][q][keep][:30]
            torch.testing.assert_close(distances[q][: found.numel()], want, rtol=1e-5, atol=1e-4)


def test_documents_excluded_for_all(
    indexes: dict[tuple[str, str], FaissIndex], queries: Tensor
) -> None:
    for factory in ("Flat", "IVF16,PQ16x4", "RR32,IVF16,PQ16x4"):
        index = indexes[factory, "l2"]
        _, indices = index.search(queries, 30, [0, 2, 3], nprobe=16)
        found = index.datastore.document_of(indices).unique().tolist()
        assert set(found) <= {1, 4, 5} and len(found) > 1
        _, nothing = index.search(queries, 30, list(range(6)), nprobe=16)
        assert (nothing == -1).all()


def test_nprobe_by_call_and_by_variant(
    indexes: dict[tuple[str, str], FaissIndex], queries: Tensor
) -> None:
    index = indexes["IVF16,Flat", "l2"]
    exact, _ = ExactIndex(index.datastore).search(queries, 10)
    recalls = []
    for nprobe in (1, 2, 16):
        distances, _ = index.search(queries, 10, nprobe=nprobe)
        recalls.append(float((distances <= exact[:, -1:] + 1e-3).float().mean()))
    assert recalls == sorted(recalls) and recalls[0] < recalls[-1] == 1.0
    variant = index.with_options(nprobe=1, rescore=True)
    assert torch.equal(
        variant.search(queries, 10)[1].sort()[0], index.search(queries, 10, nprobe=1)[1].sort()[0]
    )
    assert index.nprobe == 32 and variant.nprobe == 1 and variant.rescore and not index.rescore
    with pytest.raises(ValueError, match="nprobe"):
        index.search(queries, 10, nprobe=0)


def test_queries_are_rounded_like_the_keys(
    indexes: dict[tuple[str, str], FaissIndex], queries: Tensor
) -> None:
    index = indexes["IVF16,PQ16x4", "l2"]
    for one, other in zip(index.search(queries, 9), index.search(queries.half(), 9), strict=True):
        assert torch.equal(one, other)
    assert index.search(queries[:0], 9)[0].shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_key_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    store = make_datastore(tmp_path / "ds", clustered(500, dtype=dtype))
    index = FaissIndex.build(store, None, "Flat", add_chunk=64)
    assert index.path == tmp_path / "ds.index"
    assert check_exactness(index, store.keys[:50].float(), 5, sample=50).exact


# Factory and sample


@pytest.mark.parametrize(
    ("rows", "dim", "factory"),
    [
        (112_733_184, 1024, "IVF4096,PQ64"),  # the paper's
        (7_661_274, 1024, "IVF4096,PQ64"),
        (400_000, 128, "IVF2048,PQ64"),
        (400_000, 768, "IVF2048,PQ64"),
        (400_000, 65, "IVF2048,SQ8"),
        (400_000, 100, "IVF2048,SQ8"),
        (400_000, 64, "IVF2048,PQ32"),
        (400_000, 16, "IVF2048,PQ8"),
        (400_000, 7, "IVF2048,SQ8"),
        (400_000, 1, "IVF2048,SQ8"),
        (9_984, 128, "IVF256,PQ64"),
        (9_983, 128, "Flat"),
        (1, 128, "Flat"),
    ],
)
def test_default_factory(rows: int, dim: int, factory: str) -> None:
    assert default_factory(rows, dim) == factory
    assert faiss.index_factory(dim, factory).d == dim


def test_sample_is_sorted_distinct_and_seeded() -> None:
    rows = sample_rows(10_000, 3_000, seed=1)
    assert rows.dtype == torch.int64 and (rows.diff() > 0).all()
    assert rows[0] >= 0 and rows[-1] < 10_000
    assert torch.equal(rows, sample_rows(10_000, 3_000, seed=1))
    assert not torch.equal(rows, sample_rows(10_000, 3_000, seed=2))
    assert abs(float(rows.double().mean()) - 5_000) < 200  # not the first rows
    assert torch.equal(sample_rows(5, 5, seed=0), torch.arange(5))


def test_bad_requests(stores: dict[str, Datastore], tmp_path: Path) -> None:
    store = stores["l2"]
    for arguments, words in (
        ({"factory": "IVF4096,PQ8"}, "asks for 4096 lists"),
        ({"factory": "IVF16,PQ7"}, "does not suit FAISS for dim 32"),
        ({"factory": "nonsense"}, "does not suit FAISS"),
        ({"factory": "IVF64,PQ16x4", "train_size": 63}, "train_size"),
        ({"factory": "Flat", "segment_rows": 0}, "segment_rows"),
        ({"factory": "Flat", "add_chunk": 0}, "add_chunk"),
        ({"factory": "Flat", "nprobe": 0}, "nprobe"),
        ({"factory": "Flat", "gpu": "maybe"}, "gpu must be"),
    ):
        with pytest.raises(ValueError, match=words):
            FaissIndex.build(store, tmp_path / "bad", **arguments)
    with pytest.raises(FileNotFoundError, match="no finished index"):
        FaissIndex.open(tmp_path / "none", store)


class PretendedGpus:
    """As much of FAISS for GPUs as FaissIndex calls; replicas are copies on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.fails, self.replicas, self.nprobes = fails, [], []
        pretended = {
            "get_num_gpus": lambda: 1,
            "GpuMultipleClonerOptions": SimpleNamespace,
            "index_cpu_to_all_gpus": self.replicate,
            "index_gpu_to_cpu": lambda index: index,
            "GpuParameterSpace": lambda: SimpleNamespace(set_index_parameter=self.set),
        }
        for name, value in pretended.items():
            monkeypatch.setattr(faiss, name, value, raising=False)

    def replicate(self, index: Any, co: Any) -> Any:
        if self.fails:
            raise RuntimeError("Error in clone:\nThis index type is not implemented on GPU")
        self.replicas.append(faiss.clone_index(index))
        return self.replicas[-1]

    def set(self, index: Any, name: str, nprobe: int) -> None:
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is None:
            raise RuntimeError(f"could not set parameter {name}")
        ivf.nprobe = nprobe
        self.nprobes.append(nprobe)


@pytest.mark.parametrize(("factory", "nprobes"), [("Flat", []), ("IVF16,Flat", [5])])
def test_a_replica_on_gpus_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, nprobes: list[int]
) -> None:
    """nprobe is set where there are lists; a flat index on a GPU refuses it."""
    store = make_datastore(tmp_path / "store", clustered(ROWS), "l2")
    queries = store.keys[:7].float()
    plain = FaissIndex.build(store, tmp_path / "cpu", factory, gpu=False)
    gpus = PretendedGpus(monkeypatch)
    index = FaissIndex.build(store, tmp_path / "gpu", factory)
    got, want = index.search(queries, 9, nprobe=5), plain.search(queries, 9, nprobe=5)
    assert gpus.replicas and gpus.nprobes == nprobes
    assert torch.equal(got[1], want[1])


def test_a_replica_has_the_rows_that_were_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the objects with one index they were added to."""
    keys = clustered(ROWS)
    gpus = PretendedGpus(monkeypatch)
    index = FaissIndex.from_tensors(keys[:500], factory="IVF4,Flat")
    other = index.with_options(nprobe=4)
    assert other.search(keys[:3], 1)[1].tolist() == [[0], [1], [2]]
    before = len(gpus.replicas)
    index.add(keys[500:])
    assert len(gpus.replicas) == before  # made when it is next asked
    for one in (other, index):
        for _ in range(2):
            assert one.search(keys[500:503], 1, nprobe=4)[1].tolist() == [[500], [501], [502]]
    assert len(gpus.replicas) == before + 2 and len(gpus.nprobes) == 5


def test_what_gpus_cannot_hold_stays_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_datastore(tmp_path / "store", clustered(ROWS), "l2")
    PretendedGpus(monkeypatch, fails=True)
    with pytest.warns(UserWarning, match="keeps this index on the CPU: .*not implemented on GPU"):
        index = FaissIndex.build(store, tmp_path / "index", "Flat")
    assert index.search(store.keys[:3].float(), 4)[1][:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="gpu=True, but FAISS cannot put this index on a GPU"):
        FaissIndex.open(tmp_path / "index", store, gpu=True)
