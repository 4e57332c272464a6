"""What others change in the same process: FAISS's methods, torch's defaults, types of numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from knnext.datastore import Datastore
from knnext.evaluation.pieces import Piece
from knnext.evaluation.spans import neighbor_spans
from knnext.evaluation.stream import _Found, describe_stream
from knnext.index import ExactIndex, FaissIndex, check_exactness
from tests.index.stores import clustered, make_datastore

pytest.importorskip("faiss")

ROWS = 1200


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    return make_datastore(tmp_path_factory.mktemp("stores") / "s", clustered(ROWS))


# faiss.contrib.torch_utils puts methods of its own in the place of FAISS's

SEARCH = """
import sys
{first}
import torch
from knnext.datastore import Datastore
from knnext.index import FaissIndex
store = Datastore.open(sys.argv[1])
built = []
for number, factory in enumerate(("Flat", "IVF16,PQ8x4", "HNSW8", "OPQ8,IVF8,PQ8x4")):
    built.append(FaissIndex.build(store, sys.argv[2] + f"/{{number}}", factory, gpu=False))
{then}
results = []
for number, index in enumerate(built):
    rebuilt = FaissIndex.build(store, sys.argv[2] + f"/again{{number}}", index.factory, gpu=False)
    for one in (index, rebuilt):
        queries = store.keys[0:5]
        results += [*one.search(queries, 4), *one.search(queries, 4, [1], nprobe=3)]
        results += [one.decode(torch.tensor([1, 5]))]
        assert one.with_options(rescore=True).search(queries, 4)[0].dtype == torch.float32
torch.save(results, sys.argv[3])
"""


@pytest.mark.slow
def test_torch_utils_of_faiss_may_be_imported_before_or_after(
    store: Datastore, tmp_path: Path
) -> None:
    found = {}
    line = "import faiss.contrib.torch_utils"
    for name, first, then in (("without", "", ""), ("before", line, ""), ("after", "", line)):
        (tmp_path / name).mkdir()
        words = [str(store.path), str(tmp_path / name), str(tmp_path / f"{name}.pt")]
        program = "import torch; torch.set_num_threads(1)\n" + SEARCH.format(first=first, then=then)
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        found[name] = torch.load(tmp_path / f"{name}.pt")
    for name in ("before", "after"):
        assert all(map(torch.equal, found[name], found["without"])), name


# torch's defaults


@contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


class Words:
    """A tokenizer that writes numbers."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(map(str, ids))


def searched(index: Any, queries: Tensor) -> dict[str, Tensor | None]:
    """Neighbors of all queries, found in pieces."""
    found = _Found(index, len(queries), 6, True)
    for first in range(0, len(queries), 4):
        part = queries[first : first + 4]
        none = torch.zeros(len(part), device="cpu")
        found.search(Piece(first, part, none.long(), none), None)
    return {"distances": found.distances, "tokens": found.tokens, "indices": found.indices}


def everything(store: Datastore, folder: Path, queries: Tensor, rows: Tensor) -> list[Any]:
    """Results of all that searches and reads, as plain tensors."""
    exact = ExactIndex(store, chunk_bytes=20_000)
    fresh = Datastore.open(store.path)
    faiss_index = FaissIndex.build(fresh, folder, "IVF8,SQ8", segment_rows=500, gpu=False)
    results: list[Any] = []
    for index in (exact, ExactIndex(store, metric="ip"), faiss_index):
        for excluded in (None, [1, 3], rows % 6):
            results += index.search(queries, 7, excluded)
            results.append(index.tokens(results[-1]))
    results += faiss_index.search(queries, 7, rescore=True)
    results.append(faiss_index.decode(rows))
    results.append(check_exactness(exact, queries, 5, sample=3))
    results += [fresh.keys[[1, 5]], fresh.values[::3], fresh.document_of(rows)]
    half = fresh.subsample(0.5)
    results += [half.keys[0:9], half.document_offsets, fresh.shard(1, 3).document_offsets]
    results += neighbor_spans(fresh, Words(), rows)
    results += searched(exact, queries).values()
    return results


def scored(store: Datastore, queries: Tensor, folder: Path) -> list[Any]:
    """Figures of a text with known scores."""
    from knnext.corpus import TokenizedDocuments
    from knnext.evaluation import StreamScores, evaluate, write_token_log
    from knnext.evaluation.tune import tune
    from knnext.report.explorer import System, explorer_data
    from knnext.report.rows import table_rows

    count = len(queries)
    counts = np.array([count // 2, count + 1 - count // 2])
    text = TokenizedDocuments(
        np.arange(count + 1, dtype=np.int32),
        np.array([0, counts[0], counts.sum()]),
        ["a", "b"],
        counts,
        5 * counts,
    )
    targets = torch.from_numpy(np.arange(1, count + 1))
    log_p_lm = -torch.from_numpy(np.linspace(1, 9, count, dtype=np.float32))
    found = searched(ExactIndex(store), queries)
    scores = StreamScores(**describe_stream(text, targets, log_p_lm), **found)
    fit = tune(scores, [1.0, 10.0, 100.0], [0, 0.2, 0.5])
    figures = evaluate(scores, fit.temperature, 0.3)
    scores.save(folder / "s.npz")
    again = StreamScores.load(folder / "s.npz")
    write_token_log(again, folder / "log.jsonl", 10.0, 0.3)
    rows = [row.perplexity_interval for row in table_rows({"x": figures}, {})]
    explained = explorer_data([System("x", again, 10.0, 0.3)], store, Words())
    return [fit.surface.tolist(), figures.mixture, figures.oracle, rows, explained, again.distances]


@pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.bfloat16, None), (torch.float64, None), (torch.float32, "meta"), (torch.half, "meta")],
)
def test_defaults_set_by_others_change_nothing(
    store: Datastore, tmp_path: Path, dtype: torch.dtype, device: str | None
) -> None:
    queries = clustered(12, seed=5).float()
    rows = torch.arange(12) * 7
    for number, run in enumerate((everything, scored)):
        (tmp_path / "b").mkdir(exist_ok=True)
        words = (queries, rows) if run is everything else (queries, tmp_path / "b")
        arguments = (tmp_path / f"a{number}", *words) if run is everything else words
        wanted = run(store, *arguments)  # type: ignore[operator]
        again = (tmp_path / f"c{number}", *words) if run is everything else words
        with defaults(dtype, device):
            found = run(store, *again)  # type: ignore[operator]
        assert len(found) == len(wanted)
        for got, want in zip(found, wanted, strict=True):
            if isinstance(want, Tensor):
                assert got.dtype == want.dtype and got.device == want.device
                assert torch.equal(got, want)
            else:
                assert got == want


# Whole numbers of other types


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor])
def test_whole_numbers_of_any_type(store: Datastore, tmp_path: Path, kind: Any) -> None:
    queries = store.keys[0:3]
    index = FaissIndex.build(store, tmp_path / "ix", "IVF8,Flat", nprobe=kind(4), gpu=False)
    for one in (ExactIndex(store, query_batch=kind(2)), index):
        wanted = one.search(queries, 4)
        found = one.search(queries, kind(4))
        assert all(map(torch.equal, found, wanted)) and found[0].shape == (3, 4)
    assert torch.equal(index.search(queries, 4, nprobe=kind(8))[1][:, 0], torch.arange(3))
    assert check_exactness(index, queries, kind(4), sample=kind(2)).num_queries == 2


@pytest.mark.parametrize("k", [0, -1, True, 1.0, "3", None, np.float32(2), np.int64(0)])
def test_what_is_no_number_of_neighbors_is_named(store: Datastore, k: Any) -> None:
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        ExactIndex(store).search(store.keys[0:1], k)
