"""FaissIndex: conventions, real scores, exclusion, wrong pairs, damage, and killed builds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from knnext.datastore import Datastore
from knnext.index import ExactIndex, FaissIndex, IndexMismatchError, check_exactness
from knnext.index.faiss_build import default_factory, make_recipe, sample_rows

faiss = pytest.importorskip("faiss")

DIM, ROWS = 32, 3000
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


def clustered(rows: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    centers = torch.randn(40, DIM, generator=generator) * 2
    generator.manual_seed(seed)
    which = torch.randint(0, 40, (rows,), generator=generator)
    return (centers[which] + torch.randn(rows, DIM, generator=generator) * 0.7).to(dtype)


def make_datastore(
    path: Path, keys: Tensor, metric: str = "l2", num_documents: int = 6
) -> Datastore:
    per_document = -(-keys.shape[0] // num_documents)
    sizes = [
        (f"d{i}", min(per_document, keys.shape[0] - i * per_document)) for i in range(num_documents)
    ]
    with Datastore.create(
        path, keys.shape[1], keys.dtype, metric=metric, key_layer="att", entries_per_shard=800
    ) as store:
        store.append(keys, torch.arange(keys.shape[0]) % 50, sizes)
    return Datastore.open(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Datastore]:
    folder = tmp_path_factory.mktemp("stores")
    return {m: make_datastore(folder / m, clustered(ROWS), m) for m in ("l2", "ip")}


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
        want = everything[1][q][keep][:30]
        if factory.endswith("RFlat"):
            # Refining depends on k: only the rows may be compared, and only those sure to be in.
            assert torch.isin(indices[q][:5], everything[1][q][keep]).all()
            continue
        assert torch.equal(indices[q][: want.numel()], want)
        torch.testing.assert_close(
            distances[q][: want.numel()], everything[0][q][keep][:30], rtol=1e-5, atol=1e-4
        )


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


# Wrong pairs and damage


@pytest.fixture
def built(stores: dict[str, Datastore], tmp_path: Path) -> FaissIndex:
    return FaissIndex.build(stores["l2"], tmp_path / "ix", "IVF16,PQ16x4", nprobe=5)


def test_build_leaves_two_files_and_reopens(built: FaissIndex) -> None:
    assert sorted(p.name for p in built.path.iterdir()) == ["index.faiss", "index.json"]
    described = json.loads((built.path / "index.json").read_text())
    assert described["recipe"]["factory"] == built.factory == "IVF16,PQ16x4"
    assert described["recipe"]["num_entries"] == ROWS and described["nprobe"] == 5
    before = (built.path / "index.faiss").stat().st_mtime_ns
    again = FaissIndex.build(built.datastore, built.path, "IVF16,PQ16x4")
    assert (built.path / "index.faiss").stat().st_mtime_ns == before
    assert FaissIndex.open(built.path, built.datastore).nprobe == 5
    assert again.num_bytes == (built.path / "index.faiss").stat().st_size


def test_another_metric_is_refused(built: FaissIndex, stores: dict[str, Datastore]) -> None:
    with pytest.raises(IndexMismatchError, match="metric is 'l2' in the index and 'ip'"):
        FaissIndex.open(built.path, stores["ip"])


def test_another_size_is_refused(built: FaissIndex, tmp_path: Path) -> None:
    more = make_datastore(tmp_path / "more", clustered(ROWS + 1))
    with pytest.raises(IndexMismatchError, match="num_entries is 3000 in the index and 3001"):
        FaissIndex.open(built.path, more)


def test_another_datastore_of_the_same_shape_is_refused(built: FaissIndex, tmp_path: Path) -> None:
    other = make_datastore(tmp_path / "other", clustered(ROWS, seed=1))
    with pytest.raises(IndexMismatchError, match="another datastore"):
        FaissIndex.open(built.path, other)
    with pytest.raises(IndexMismatchError, match="datastore is"):
        FaissIndex.build(other, built.path, "IVF16,PQ16x4")


def test_a_part_of_the_datastore_is_refused(built: FaissIndex) -> None:
    with pytest.raises(IndexMismatchError, match="num_entries"):
        FaissIndex.open(built.path, built.datastore.shard(0, 2))


def test_another_recipe_is_refused_and_can_be_overwritten(built: FaissIndex) -> None:
    with pytest.raises(IndexMismatchError, match="factory is 'IVF16,PQ16x4', wanted 'IVF8,PQ16x4'"):
        FaissIndex.build(built.datastore, built.path, "IVF8,PQ16x4")
    assert (
        FaissIndex.build(built.datastore, built.path, "IVF8,PQ16x4", overwrite=True).factory
        == "IVF8,PQ16x4"
    )


def test_an_inner_product_file_under_an_l2_sidecar_is_refused(
    built: FaissIndex, stores: dict[str, Datastore], tmp_path: Path
) -> None:
    """The published run book's slip: the right name on the wrong index."""
    other = FaissIndex.build(stores["ip"], tmp_path / "ip", "IVF16,PQ16x4")
    wrong = (other.path / "index.faiss").read_bytes()
    (built.path / "index.faiss").write_bytes(wrong)
    with pytest.raises(IndexMismatchError, match=r"bytes, its sidecar says|is damaged"):
        FaissIndex.open(built.path, built.datastore)
    if len(wrong) == built.num_bytes:
        with pytest.raises(IndexMismatchError, match="holds"):
            FaissIndex.open(built.path, built.datastore, verify=False)


def test_damage_is_noticed(built: FaissIndex) -> None:
    file, sidecar = built.path / "index.faiss", built.path / "index.json"
    whole, text = file.read_bytes(), sidecar.read_text()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(IndexMismatchError, match="is damaged"):
        FaissIndex.open(built.path, built.datastore)
    file.write_bytes(whole[:-1])
    with pytest.raises(IndexMismatchError, match="bytes, its sidecar says"):
        FaissIndex.open(built.path, built.datastore)
    file.unlink()
    with pytest.raises(IndexMismatchError, match="is missing"):
        FaissIndex.open(built.path, built.datastore)
    file.write_bytes(whole)
    for broken, words in (
        (text[:40], "not readable JSON"),
        (text.replace("knnext-faiss-index", "other"), "does not describe"),
        (text.replace('"format_version": 1', '"format_version": 2'), "format version 2"),
        (text.replace('"seed"', '"sead"'), "is incomplete"),
        ("[]", "JSON object"),
    ):
        assert broken != text
        sidecar.write_text(broken)
        with pytest.raises(IndexMismatchError, match=words):
            FaissIndex.open(built.path, built.datastore)
    sidecar.write_text(text)
    FaissIndex.open(built.path, built.datastore)


# Builds that are cut short


@pytest.mark.parametrize("factory", ["Flat", "IVF16,PQ16x4", "RR32,IVF16,PQ16x4", "HNSW16"])
def test_merged_segments_are_the_unbroken_index(
    stores: dict[str, Datastore], queries: Tensor, tmp_path: Path, factory: str
) -> None:
    """Segments of 700 rows and one of all: the same neighbors at the same distances."""
    parts = FaissIndex.build(stores["l2"], tmp_path / "parts", factory, segment_rows=700)
    whole = FaissIndex.build(stores["l2"], tmp_path / "whole", factory, segment_rows=ROWS)
    for one, other in zip(parts.search(queries, 50), whole.search(queries, 50), strict=True):
        assert torch.equal(one, other)


BUILD = """
    import os, signal, sys
    from pathlib import Path
    import knnext.index.sidecar as sidecar
    import knnext.index.faiss_build as faiss_build
    from knnext.datastore import Datastore
    from knnext.index import FaissIndex

    store, folder, moment = Datastore.open(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    seen = 0

    def die_at_moment():
        global seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    real_write, real_finish = sidecar.write_atomically, faiss_build._finish

    def write(path, fill):
        def fill_and_die(part):
            fill(part)
            die_at_moment()      # written under its temporary name, not yet renamed
        real_write(path, fill_and_die)
        die_at_moment()          # renamed, nothing after it done

    faiss_build.write_atomically = sidecar.write_atomically = write
    FaissIndex.build(store, folder, "IVF16,PQ16x4", segment_rows=800, add_chunk=300, gpu=False)
    print("finished", seen)
"""


def run_build(store: Datastore, folder: Path, moment: int) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(BUILD),
        str(store.path),
        str(folder),
        str(moment),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_killed_build_goes_on_to_the_same_bytes(
    stores: dict[str, Datastore], tmp_path: Path
) -> None:
    """kill -9 before and after the rename of several files, then once more without a kill."""
    unbroken = tmp_path / "unbroken"
    done = run_build(stores["l2"], unbroken, 0)
    # recipe, trained, 4 segments, index, sidecar: two moments each
    assert done.stdout.split() == ["finished", "16"], done.stderr
    wanted = (unbroken / "index.faiss").read_bytes()
    for moment in (3, 8, 13, 15):
        folder = tmp_path / f"killed-{moment}"
        killed = run_build(stores["l2"], folder, moment)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (folder / "index.json").exists()
        left = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.suffix != ".part"}
        resumed = run_build(stores["l2"], folder, 0)
        assert resumed.returncode == 0, resumed.stderr
        assert (folder / "index.faiss").read_bytes() == wanted
        assert sorted(p.name for p in folder.iterdir() if p.suffix != ".part") == [
            "index.faiss",
            "index.json",
        ]
        if moment >= 8:
            assert "trained.faiss" in left and int(resumed.stdout.split()[1]) < 16


def test_finished_segments_are_not_added_again(
    stores: dict[str, Datastore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import knnext.index.faiss_build as faiss_build

    def no_merge(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(faiss_build, "_merge", no_merge)
        with pytest.raises(KeyboardInterrupt):
            FaissIndex.build(stores["l2"], tmp_path / "ix", "IVF16,PQ16x4", segment_rows=1000)
    monkeypatch.setattr(faiss_build, "_train", None)  # a call would fail
    monkeypatch.setattr(faiss_build.faiss_library, "as_float32", None)
    faiss_build.build(
        stores["l2"],
        tmp_path / "ix",
        make_recipe(stores["l2"], "IVF16,PQ16x4", None, 1, 1000),
        nprobe=1,
        add_chunk=10,
        gpu=False,
    )
    assert (tmp_path / "ix" / "index.json").exists()
    with pytest.raises(IndexMismatchError):
        FaissIndex.build(stores["ip"], tmp_path / "ix", "IVF16,PQ16x4", segment_rows=1000)


def test_an_unfinished_build_of_another_recipe_is_refused(
    stores: dict[str, Datastore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import knnext.index.faiss_build as faiss_build

    with monkeypatch.context() as patch:
        patch.setattr(faiss_build, "_add_segments", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            FaissIndex.build(stores["l2"], tmp_path / "ix", "IVF16,PQ16x4")
    with pytest.raises(FileNotFoundError, match="no finished index"):
        FaissIndex.open(tmp_path / "ix", stores["l2"])
    with pytest.raises(IndexMismatchError, match="seed is 1, wanted 2"):
        FaissIndex.build(stores["l2"], tmp_path / "ix", "IVF16,PQ16x4", seed=2)
    assert FaissIndex.build(stores["l2"], tmp_path / "ix", "IVF16,PQ16x4").sidecar.recipe.seed == 1


def test_the_seed_decides(stores: dict[str, Datastore], tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        index = FaissIndex.build(stores["l2"], tmp_path / name, "IVF16,PQ16x4", seed=seed)
        files.append((index.path / "index.faiss").read_bytes())
    assert files[0] == files[1] != files[2]


def test_without_faiss_the_error_says_what_to_install(
    stores: dict[str, Datastore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"knnext\[faiss\]"):
        FaissIndex.build(stores["l2"], tmp_path / "ix", "Flat")
