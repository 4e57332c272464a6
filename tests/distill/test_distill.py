"""Sparse targets of a text from its own datastore: what the files hold, going on after a kill."""

from __future__ import annotations

import json
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from knnext.corpus import Document, TokenizedDocuments
from knnext.datastore import Datastore, UnfinishedDatastoreError
from knnext.datastore.build import build_datastore
from knnext.datastore.overlap import OverlapError
from knnext.distill import DistillationData, collate, distill, job, sparse
from knnext.distill.sparse import row_bytes, sparse_targets
from knnext.errors import CorruptDatastoreError, DatastoreFullError, IncompatibleDatastoreError
from knnext.evaluation import search_stream
from knnext.index import ExactIndex, FaissIndex
from knnext.lm.train import train_tokenizer
from tests.lm.tiny_models import VOCAB, random_tokens, tiny

pytest.importorskip("pyarrow")

LENGTHS = [40, 7, 90, 3, 60]
WINDOWS: dict[str, Any] = {"block_size": 16, "stride": 8, "batch_size": 2}
OPTIONS: dict[str, Any] = {"temperature": 5.0, "k": 12, "top": 4}
Made = dict[str, Any]


def a_text(lengths: list[int], seed: int = 0) -> TokenizedDocuments:
    tokens = random_tokens(sum(lengths), seed).numpy().astype(np.int32)
    offsets = np.cumsum([0, *lengths])
    tokens[offsets[:-1]] = 1
    ones = np.ones(len(lengths), int)
    hashes = np.arange(1, 16 * len(lengths) + 1).reshape(-1, 16).astype(np.uint8) + seed
    names = [f"doc {seed} {i}" for i in range(len(lengths))]
    return TokenizedDocuments(tokens, offsets, names, ones, ones, hashes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model, a text, and datastores of it read as one stream and document by document."""
    folder, model, text = tmp_path_factory.mktemp("distill"), tiny("gpt2"), a_text(LENGTHS)
    tokenizer = train_tokenizer([Document("a", "some text to learn from\n" * 9)], vocab_size=260)
    stores = {
        name: build_datastore(
            model, tokenizer, text, folder / name, separate_documents=name == "apart", **WINDOWS
        )
        for name in ("stream", "apart")
    }
    return {"model": model, "text": text, "tokenizer": tokenizer, **stores}


def run(made: Made, folder: Path, which: str = "stream", **options: Any) -> Any:
    index = options.pop("index", None) or ExactIndex(made[which])
    text = options.pop("text", made["text"])
    return distill(made["model"], index, text, folder, **{**OPTIONS, **WINDOWS, **options})


def note(seen: list[tuple[int, int]], done: int, total: int) -> None:
    seen.append((done, total))


def rows(folder: Path) -> dict[str, list[Any]]:
    from pyarrow import parquet

    files = sorted(folder.glob("tokens-*.parquet"))
    tables = [parquet.read_table(file) for file in files]
    return {n: [v for t in tables for v in t.column(n).to_pylist()] for n in tables[0].column_names}


def reference(distances: Tensor, tokens: Tensor, temperature: float) -> list[dict[int, float]]:
    """p_knn by its definition."""
    found = []
    for near, names in zip(distances.tolist(), tokens.tolist(), strict=True):
        weights = [
            math.exp(-d / temperature) if t >= 0 else 0.0 for d, t in zip(near, names, strict=True)
        ]
        p: dict[int, float] = {}
        for weight, token in zip(weights, names, strict=True):
            if weight:
                p[token] = p.get(token, 0.0) + weight / sum(weights)
        found.append(p)
    return found


@pytest.mark.parametrize("which", ["stream", "apart"])
@pytest.mark.parametrize("exclude", ["document", "row"])
def test_the_files_hold_p_knn_without_what_is_the_tokens_own(
    which: str, exclude: str, made: Made, tmp_path: Path
) -> None:
    store, text = made[which], made["text"]
    done = run(made, tmp_path / "D", which, exclude=exclude, shard_tokens=64)
    found = rows(tmp_path / "D")
    marks = set((text.document_offsets[1:-1]).tolist()) if which == "apart" else set()
    places = [p for p in range(1, len(text)) if p not in marks]
    assert found["position"] == places and done.tokens == len(places)
    assert found["token"] == text.tokens[places].tolist()
    assert found["previous"] == text.tokens[np.array(places) - 1].tolist()
    of = text.document_of(np.array(places))
    assert found["document"] == of.tolist()
    # Every other row of the datastore, and nothing else, by brute force.
    count = len(store)
    positions = torch.tensor(places) - 1
    queries = store.keys[:][positions].double()
    distances = torch.cdist(queries, store.keys[:].double()).square()
    owners = store.document_of(torch.arange(count))
    own = (
        owners[None] == torch.from_numpy(of)[:, None]
        if exclude == "document"
        else torch.arange(count)[None] == positions[:, None]
    )
    near, indices = distances.masked_fill(own, torch.inf).sort(dim=1, stable=True)
    tokens = store.values[:][indices[:, :12]]
    for row, wanted in enumerate(reference(near[:, :12], tokens, 5.0)):
        best = sorted(wanted.items(), key=lambda item: (-item[1], item[0]))[:4]
        p = found["p"][row]
        assert len(found["ids"][row]) == len(best) and p == sorted(p, reverse=True)
        for token, value in zip(found["ids"][row], p, strict=True):
            assert value == pytest.approx(wanted[token], rel=2e-3, abs=1e-6)
        assert sum(p) + found["tail"][row] == pytest.approx(1, abs=1e-3)
        log_p = (
            math.log(wanted[found["token"][row]]) if found["token"][row] in wanted else -math.inf
        )
        assert found["log_p_knn"][row] == pytest.approx(log_p, abs=2e-3)
    assert done.excluded_documents == 5 and done.copies == 0
    assert done.num_bytes == sum(f.stat().st_size for f in (tmp_path / "D").glob("*.parquet"))


def test_with_a_text_that_is_not_in_it_the_figures_are_those_of_an_evaluation(
    made: Made, tmp_path: Path
) -> None:
    other = a_text([30, 50], seed=7)
    index = ExactIndex(made["stream"])
    scores = search_stream(made["model"], index, other, k=12, **WINDOWS)
    for exclude in ("none", "document", "row"):
        done = run(made, tmp_path / exclude, text=other, exclude=exclude)
        found = rows(tmp_path / exclude)
        assert done.excluded_documents == 0
        assert found["log_p_lm"] == scores.log_p_lm.tolist()
        assert found["log_p_knn"] == scores.log_p_knn(5.0).tolist()
    for lmbda in (0.0, 0.3):
        wanted = -float(scores.log_p(5.0, lmbda).mean())
        data = DistillationData(tmp_path / "none")
        assert data.teacher_nll(lmbda) == pytest.approx(wanted, rel=1e-6)


def test_through_faiss(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    exact = run(made, tmp_path / "exact")
    index = FaissIndex.build(made["stream"], path=tmp_path / "index", factory="Flat")
    found = run(made, tmp_path / "faiss", index=index)
    assert found.tokens == exact.tokens
    one, other = rows(tmp_path / "faiss"), rows(tmp_path / "exact")
    assert np.mean([a == b for a, b in zip(one["ids"], other["ids"], strict=True)]) > 0.95
    with pytest.raises(IncompatibleDatastoreError, match=r"search: the data has 'faiss, Flat"):
        run(made, tmp_path / "faiss")


# Going on


def test_a_killed_one_goes_on_and_ends_with_the_same_bytes(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(made, tmp_path / "whole", shard_tokens=50, query_batch=13)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").glob("[!.]*")}
    assert len(whole) == 5, "four shards and the plan"
    usual = job._Work.write
    for stop in (0, 2):

        def write(work: Any, path: Path, first: int, last: int, left: list[int] = [stop]) -> None:  # noqa: B006
            usual(work, path, first, last)
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr(job._Work, "write", write)
            with pytest.raises(KeyboardInterrupt):
                run(made, folder, shard_tokens=50, query_batch=13)
        assert len(list(folder.glob("tokens-*.parquet"))) == stop
        (folder / "tokens-00003.parquet.1-0.part").write_bytes(b"of a kill that cleaned nothing")
        with pytest.raises(UnfinishedDatastoreError, match=f"{4 - stop} of 4 shards are missing"):
            DistillationData(folder)
        seen: list[tuple[int, int]] = []
        run(made, folder, shard_tokens=50, query_batch=13, progress=partial(note, seen))
        assert {f.name: f.read_bytes() for f in folder.glob("[!.]*")} == whole
        assert seen[0][0] == sum(json.loads(whole["distill.json"])["shards"][:stop])
    # And with windows that nobody repeats, as the plan has them.
    again = distill(made["model"], ExactIndex(made["stream"]), made["text"], tmp_path / "whole",
                    shard_tokens=50, **OPTIONS)  # fmt: skip
    assert again.shards == 4


def test_what_it_was_begun_with_is_what_it_goes_on_with(made: Made, tmp_path: Path) -> None:
    run(made, tmp_path / "D")
    for change, words in (
        ({"temperature": 6.0}, "temperature: the data has 5.0, asked for 6.0"),
        ({"k": 11}, "k: the data has 12, asked for 11"),
        ({"top": 5}, "top: the data has 4"),
        ({"exclude": "row"}, "exclude: the data has 'document'"),
        ({"stride": 4}, "stride: the data has 8"),
        ({"shard_tokens": 20}, "cut at other tokens"),
        ({"which": "apart"}, "datastore: the data has"),
        ({"text": a_text([9, 30], seed=3)}, "text: the data has 'sha256:"),
    ):
        with pytest.raises(IncompatibleDatastoreError, match=words):
            run(made, tmp_path / "D", **change)


def test_refusals_come_before_the_work(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change, words in (
        ({"temperature": 0}, "temperature must be positive"),
        ({"top": 0}, "top must be"),
        ({"exclude": "self"}, "exclude must be one of document, row, none; got 'self'"),
        ({"shard_tokens": 0}, "shard_tokens must be"),
    ):
        with pytest.raises(ValueError, match=words):
            run(made, tmp_path / "D", **change)
    (tmp_path / "F").mkdir()
    (tmp_path / "F" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, and holds no distillation data"):
        run(made, tmp_path / "F")
    unknown = a_text(LENGTHS)
    unknown.hashes = None
    with pytest.raises(ValueError, match=r"keeps no hashes of documents, .*--exclude none"):
        run(made, tmp_path / "D", text=unknown)
    edited = a_text(LENGTHS)
    edited.hashes = edited.hashes.copy()
    edited.hashes[2] = 77
    edited.names = list(edited.names)
    with pytest.raises(OverlapError, match="1 of the 5 documents"):
        run(made, tmp_path / "D", text=edited)
    sample = made["stream"].subsample(0.5)
    with pytest.raises(ValueError, match="its rows do not follow the text"):
        run(made, tmp_path / "D2", index=ExactIndex(sample), exclude="row", allow_overlap=True)
    monkeypatch.setattr("knnext.datastore.room.free_bytes", lambda path: 1000)
    with pytest.raises(DatastoreFullError, match=r"the targets of 199 tokens needs"):
        run(made, tmp_path / "D3")
    assert not list(tmp_path.glob("D*/*.parquet"))


def test_memory_is_bounded_by_the_batch(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    index = ExactIndex(made["stream"])
    usual = index.search
    monkeypatch.setattr(
        index, "search", lambda q, *rest, **more: (seen.append(len(q)), usual(q, *rest, **more))[1]
    )
    mixed: list[int] = []
    monkeypatch.setattr(job, "_MIXED_BYTES", 5 * 12 * job._NEIGHBOR_BYTES)
    monkeypatch.setattr(
        job, "sparse_targets", lambda d, *rest: (mixed.append(len(d)), sparse_targets(d, *rest))[1]
    )
    run(made, tmp_path / "small", index=index, query_batch=32)
    assert max(seen) == 32 and max(mixed) == 5
    monkeypatch.undo()
    run(made, tmp_path / "large")
    assert rows(tmp_path / "small") == rows(tmp_path / "large")


# Targets and their bytes


def test_targets_by_hand() -> None:
    inf = math.inf
    distances = torch.tensor([[0, 1, 1, 2], [0, 0, 0, inf], [inf] * 4, [0, 800, 801, 9000]])
    tokens = torch.tensor([[5, 6, 5, 7], [9, 2, 4, -1], [-1] * 4, [3, 2, 1, 0]]).int()
    found = sparse_targets(distances.float(), tokens, 1 / math.log(2), 2)
    assert found.ids.tolist() == [[5, 6], [2, 4], [-1, -1], [3, -1]]
    assert found.p.double().flatten().tolist() == pytest.approx(
        [1.5 / 2.25, 0.5 / 2.25, 1 / 3, 1 / 3, 0, 0, 1, 0], rel=5e-4
    )
    assert found.tail.tolist() == pytest.approx([0.25 / 2.25, 1 / 3, 1, 0], abs=5e-4)
    assert found.p.dtype == torch.float16 and found.ids.dtype == torch.int32


@pytest.mark.parametrize("top", [1, 7, 300])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0, 400.0])
def test_what_is_kept_sums_to_one(top: int, scale: float) -> None:
    """In every row, also where all tokens are kept, and float16 rounds their sum above 1."""
    generator = torch.Generator().manual_seed(top)
    distances = torch.rand(300, 256, generator=generator).sort(1).values * scale
    tokens = torch.randint(0, 90, (300, 256), generator=generator).int()
    found = sparse_targets(distances, tokens, 3.0, top)
    p = found.p.double()
    assert torch.all((p.sum(1) + found.tail.double() - 1).abs() < 1e-7)
    assert torch.all(p.sum(1) <= 1) and torch.all(found.tail >= 0)
    assert torch.all(p.diff(dim=1) <= 0) and torch.equal(found.ids >= 0, p > 0)
    weights = (-distances.double() / 3).softmax(1)
    wanted = torch.zeros(300, 90, dtype=torch.float64).scatter_add_(1, tokens.long(), weights)
    kept = wanted.gather(1, found.ids.long().clamp_min(0)).where(found.ids >= 0, 0)
    assert torch.all((kept - p).abs() <= 2**-10 * kept + 2**-24), "a unit of float16 at most"
    left = wanted.sum(1) - kept.sum(1)
    assert torch.all((found.tail.double() - left).abs() < 2**-10)
    assert all(len(set(r) - {-1}) == sum(x >= 0 for x in r) for r in found.ids.tolist())


def test_bytes_stay_below_what_was_stated(made: Made, tmp_path: Path) -> None:
    said: list[str] = []
    done = run(made, tmp_path / "D", say=said.append)
    assert said == ["199 of 199 tokens to go, at most 60 bytes each before compression"]
    assert done.most_bytes == 199 * row_bytes(4) == 199 * 60
    rows_of = 4_000  # where what parquet says of itself no longer counts
    generator = torch.Generator().manual_seed(0)
    with sparse.ShardWriter(tmp_path / "many.parquet") as writer:
        ids = torch.rand(rows_of, 400, generator=generator).argsort(1)[:, :64].int()
        p = torch.rand(rows_of, 64, generator=generator).half()
        many = {n: torch.randint(0, 400, (rows_of,), generator=generator).int()
                for n in ("document", "previous", "token")}  # fmt: skip
        logs = {n: torch.rand(rows_of, generator=generator) for n in ("log_p_lm", "log_p_knn")}
        writer.add(sparse.Sparse(ids, p, p[:, 0].float()),
                   position=torch.arange(rows_of), **many, **logs)  # fmt: skip
    assert (tmp_path / "many.parquet").stat().st_size < rows_of * row_bytes(64)


# Reading


def test_the_data_as_torch_reads_it(made: Made, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("knnext.distill.sparse.GROUP_ROWS", 40)
    monkeypatch.setattr("knnext.distill.data.GROUP_ROWS", 40)
    run(made, tmp_path / "D", shard_tokens=100)
    wanted, data = rows(tmp_path / "D"), DistillationData(tmp_path / "D", 16)
    assert data.num_tokens == 199 and data.plan["temperature"] == 5.0
    items = [data[i] for i in range(len(data))]
    assert [len(item["labels"]) for item in items[:3]] == [16, 16, 8], "a group of 40"
    for name, column in (("input_ids", "previous"), ("labels", "token"), ("tail", "tail")):
        assert torch.cat([item[name] for item in items]).tolist() == wanted[column]
    for row, (ids, p) in enumerate(
        (ids, p) for item in items for ids, p in zip(item["ids"], item["p"], strict=True)
    ):
        assert [i for i in ids.tolist() if i >= 0] == wanted["ids"][row]
        assert p[ids >= 0].tolist() == wanted["p"][row] and not p[ids < 0].any()
    batches = list(
        torch.utils.data.DataLoader(data, batch_size=3, collate_fn=collate, shuffle=True)
    )
    assert sum(int(batch["mask"].sum()) for batch in batches) == 199
    assert batches[0]["ids"].shape[2] == 4 and batches[0]["labels"].shape == (3, 16)
    other = pickle.loads(pickle.dumps(data))
    assert torch.equal(other[-1]["labels"], items[-1]["labels"])
    with pytest.raises(IndexError):
        data[len(data)]
    for wrong in (0, 41):
        with pytest.raises(ValueError, match="block_size must be"):
            DistillationData(tmp_path / "D", wrong)


def iter_items(folder: Path) -> Any:
    data = DistillationData(folder)
    return (data[i] for i in range(len(data)))


def test_damaged_files_are_refused(made: Made, tmp_path: Path) -> None:
    run(made, tmp_path / "D", shard_tokens=100)
    first, second = sorted((tmp_path / "D").glob("*.parquet"))
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(CorruptDatastoreError, match="is not the shard that"):
        list(iter_items(tmp_path / "D"))
    second.write_bytes(content[:-20])
    with pytest.raises(CorruptDatastoreError, match="cannot be read"):
        list(iter_items(tmp_path / "D"))
    (tmp_path / "D" / "distill.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what `knnext distill` writes"):
        DistillationData(tmp_path / "D")
    with pytest.raises(ValueError, match="holds no distillation data"):
        DistillationData(tmp_path)


def test_copies_of_documents_are_told_of(made: Made, tmp_path: Path) -> None:
    merged = Datastore.merge([made["stream"], made["stream"]], tmp_path / "merged")
    done = run(made, tmp_path / "D", index=ExactIndex(merged), exclude="row")
    assert (done.excluded_documents, done.copies) == (5, 5)
    assert max(rows(tmp_path / "D")["token"]) < VOCAB
