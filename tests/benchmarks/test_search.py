"""The benchmarks' judge of a search, their shapes against the targets, and their real keys."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import knnext
from benchmarks.data import real_keys
from benchmarks.data.cases import Implementation, cases
from benchmarks.data.mixing import SHAPES as MIXING_SHAPES
from benchmarks.data.search import Data, Result, assert_exact, make_data, recall
from benchmarks.data.search_shapes import SHAPES, Shape, unique
from benchmarks.report.rows import Row
from benchmarks.report.targets import TARGETS
from knnext import Datastore

SHAPE = Shape(9, 2000, 32, 40)


def searched() -> tuple[Data, Result]:
    data = make_data(SHAPE, "cpu")[0]
    distances, indices = knnext.knn_search(data.queries, data.keys, SHAPE.k)
    return data, (distances.clone(), indices.clone())


def test_a_right_result_is_exact_whatever_its_order_among_equals() -> None:
    data, result = searched()
    assert_exact(data, result)
    assert recall(data, result) == 1.0


@pytest.mark.parametrize(
    "spoil",
    ["left out", "twice", "wrong distance", "distances of others", "padding"],
)
def test_a_wrong_result_is_seen(spoil: str) -> None:
    data, (distances, indices) = searched()
    if spoil == "left out":  # the nearest is missing, the one behind the k-th has come in
        wider = knnext.knn_search(data.queries, data.keys, SHAPE.k + 1)
        distances, indices = wider[0][:, 1:], wider[1][:, 1:]
    elif spoil == "twice":
        indices[:, 1] = indices[:, 0]
    elif spoil == "wrong distance":
        distances[0, 3] *= 1.01
    elif spoil == "distances of others":
        indices = indices.roll(1, 1)
    else:
        indices[:, -1] = -1
    with pytest.raises((AssertionError, RuntimeError)):
        assert_exact(data, (distances, indices))


def test_recall_counts_the_k_nearest_that_were_found() -> None:
    data, (distances, indices) = searched()
    indices[:, ::2] = -1
    assert recall(data, (distances, indices)) == pytest.approx(0.5)
    indices[:] = indices[:, 1:2]
    assert recall(data, (distances, indices)) == pytest.approx(1 / SHAPE.k)


def test_the_short_gpu_list_holds_the_shapes_of_every_target() -> None:
    shapes = {"knn_search": SHAPES["cuda"]}
    for target in TARGETS:
        among = shapes.get(target.op, MIXING_SHAPES["cuda"])
        rows = [Row(target.op, "knnext", "cuda", 1.0, shape.facts()) for shape in among]
        assert any(map(target.shapes, rows)), f"no shape for: {target.op} {target.what}"


@pytest.mark.parametrize("profile", SHAPES)
def test_shapes_come_once_under_names_of_their_own(profile: str) -> None:
    names = [str(shape) for shape in SHAPES[profile]]
    assert len(set(names)) == len(names)
    assert unique(SHAPES[profile], SHAPES[profile]) == SHAPES[profile]


def test_cases_leave_out_what_does_not_apply() -> None:
    chosen = {
        "anywhere": Implementation(lambda data: data),
        "on a GPU": Implementation(lambda data: data, devices=("cuda",)),
        "small": Implementation(lambda data: data, when=lambda shape: shape < 2),
    }
    shapes = {"cpu": [1, 2], "smoke": [3], "full cpu": [4]}
    found = [case for case in cases(shapes, chosen) if case[1] == "cpu"]
    assert found == [(1, "cpu", "anywhere"), (1, "cpu", "small"), (2, "cpu", "anywhere")]
    only = [c for c in cases(shapes, chosen, full=True, only=["anywhere"]) if c[1] == "cpu"]
    assert only == [(4, "cpu", "anywhere")]


def test_real_keys_and_queries_do_not_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(100.0)[:, None].expand(100, 4)
    with Datastore.create(tmp_path / "store", 4, torch.float32) as store:
        store.append(rows, torch.zeros(100, dtype=torch.int64))
    monkeypatch.setattr(real_keys._Place, "folder", tmp_path / "store")
    monkeypatch.setattr(real_keys, "HELD_OUT", 30)
    real_keys.load_keys.cache_clear()
    keys, queries = real_keys.load_keys(50), real_keys.load_queries(10)
    assert keys[:, 0].tolist() == list(range(20, 70)), "the rows in front of those held out"
    assert queries[:, 0].tolist() == list(range(70, 100, 3))
    with pytest.raises(ValueError, match="too few to ask 31"):
        real_keys.load_queries(31)
    real_keys.load_keys.cache_clear()


def test_without_real_keys_the_reason_says_how_to_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_keys._Place, "folder", tmp_path)
    with pytest.raises(pytest.skip.Exception, match=r"-m benchmarks\.data\.real_keys.*--datastore"):
        real_keys.load_queries(1)
    assert find_spec("benchmarks.data.real_keys") is not None


@pytest.mark.slow
def test_real_keys_are_made_once_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small corpus in the place of the standard library; no step of it is a stand-in."""
    pytest.importorskip("transformers")
    import knnext.corpus
    from knnext.corpus import Corpus, Document

    words = " ".join(f"def f{i}(x): return x + {i}" for i in range(200))
    documents = [Document(f"{i}.py", words) for i in range(8)]
    monkeypatch.setattr(knnext.corpus, "load_corpus", lambda name: Corpus(name, documents))
    where = real_keys.make(tmp_path, rows=300, steps=1)
    with Datastore.open(where) as store:
        assert store.num_entries >= 300 and store.keys[:1].shape == (1, 128)
    model = (tmp_path / "model/model.safetensors").stat()
    assert real_keys.make(tmp_path, rows=300, steps=1) == where
    assert (tmp_path / "model/model.safetensors").stat().st_mtime_ns == model.st_mtime_ns
