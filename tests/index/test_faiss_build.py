"""FaissIndex files: wrong pairs, damage, and builds that are killed."""

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
from knnext.index import FaissIndex, IndexMismatchError
from knnext.index.faiss_build import make_recipe
from tests.index.stores import ROWS, clustered, make_datastore

faiss = pytest.importorskip("faiss")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def queries() -> Tensor:
    return clustered(60, seed=7, dtype=torch.float32)


# Wrong pairs and damage


@pytest.fixture
def built(stores: dict[str, Datastore], tmp_path: Path) -> FaissIndex:
    return FaissIndex.build(stores["l2"], tmp_path / "ix", "IVF16,PQ16x4", nprobe=5)


def test_build_leaves_two_files_and_reopens(built: FaissIndex) -> None:
    left = sorted(p.name for p in built.path.iterdir())
    assert left == [".lock", "index.faiss", "index.json"]
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
    from contextlib import contextmanager
    from knnext import output
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

    real_write = output.whole_file

    @contextmanager
    def write(path, **options):
        with real_write(path, **options) as part:
            yield part
            die_at_moment()      # written under its temporary name, not yet renamed
        die_at_moment()          # renamed, nothing after it done

    faiss_build.whole_file = output.whole_file = write
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


@pytest.mark.parametrize("moments", [(8,), pytest.param((3, 13, 15), marks=pytest.mark.slow)])
def test_a_killed_build_goes_on_to_the_same_bytes(
    stores: dict[str, Datastore], tmp_path: Path, moments: tuple[int, ...]
) -> None:
    """kill -9 before and after the rename of several files, then once more without a kill."""
    unbroken = tmp_path / "unbroken"
    done = run_build(stores["l2"], unbroken, 0)
    # recipe, trained, 4 segments, index, sidecar: two moments each
    assert done.stdout.split() == ["finished", "16"], done.stderr
    wanted = (unbroken / "index.faiss").read_bytes()
    for moment in moments:
        folder = tmp_path / f"killed-{moment}"
        killed = run_build(stores["l2"], folder, moment)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (folder / "index.json").exists()
        left = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.suffix != ".part"}
        resumed = run_build(stores["l2"], folder, 0)
        assert resumed.returncode == 0, resumed.stderr
        assert (folder / "index.faiss").read_bytes() == wanted
        left_at_end = sorted(p.name for p in folder.iterdir() if p.suffix != ".part")
        assert left_at_end == [".lock", "index.faiss", "index.json"]
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
    monkeypatch.setattr(faiss_build, "trained", None)  # a call would fail
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
        patch.setattr(faiss_build, "add_segment", lambda *_: 1 / 0)
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
    with pytest.raises(ImportError, match=r"needs faiss: pip install .*\[faiss\]"):
        FaissIndex.build(stores["l2"], tmp_path / "ix", "Flat")
