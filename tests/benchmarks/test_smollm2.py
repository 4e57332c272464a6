"""Real keys of SmolLM2: read where they lie; made here by a small model in its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.data import smollm2
from benchmarks.data.search import make_data
from benchmarks.data.search_shapes import SHAPES, Shape
from knnext import Datastore


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(smollm2._Place, "folder", tmp_path)
    caches = (smollm2.load_keys, make_data)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def stored(folder: Path, rows: torch.Tensor) -> None:
    with Datastore.create(folder, rows.shape[1], torch.float16) as store:
        store.append(rows, torch.zeros(len(rows), dtype=torch.int64))


def test_keys_and_queries_are_of_other_documents(place: Path) -> None:
    keys, queries = torch.randn(300, 8), torch.randn(40, 8) + 9
    stored(place / "keys", keys)
    stored(place / "queries", queries)
    data = make_data(Shape(10, 200, 576, 5, keys="smollm2"), "cpu")[0]
    assert torch.equal(data.keys, keys[:200].half())
    assert torch.equal(data.queries, queries[::4].half()), "spread over all that there are"
    assert (data.shape.entries, data.shape.dim) == (200, 8), "the sizes that there are"
    with pytest.raises(ValueError, match="40 queries, 41 are wanted"):
        smollm2.load_queries(41)


def test_without_them_the_reason_says_how_to_make_them() -> None:
    with pytest.raises(
        pytest.skip.Exception, match=r"benchmarks\.data\.smollm2.*--real-keys-smoll"
    ):
        make_data(Shape(10, 200, 576, 5, keys="smollm2"), "cpu")


def test_the_lists_ask_for_them() -> None:
    for profile in ("cpu", "full cpu"):
        assert any(shape.keys == "smollm2" for shape in SHAPES[profile])
    assert not any(shape.keys == "smollm2" for shape in SHAPES["smoke"])


def test_keys_are_made_of_one_split_and_queries_of_the_others(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    import knnext.corpus
    from knnext.corpus import Corpus, Document
    from knnext.lm.train import train_tokenizer

    parts = {
        part: [Document(f"{part}{i}.py", f"{part} x + {i} " * 60) for i in range(4)]
        for part in ("train", "valid", "test")
    }
    tokenizer = train_tokenizer(parts["train"])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    model = transformers.LlamaForCausalLM(config).eval()
    monkeypatch.setattr(smollm2, "load_model", lambda: (model, tokenizer))
    monkeypatch.setattr(knnext.corpus, "load_corpus", lambda name: Corpus(name, **parts))
    assert smollm2.make(place, rows=700, queries=400) == place
    names = {}
    for part, most in (("keys", 700), ("queries", 400)):
        with Datastore.open(place / part) as store:
            assert 0 < store.num_entries <= most and store.keys[:1].shape == (1, 32)
            names[part] = set(store.document_names)
    assert all(name.startswith("train") for name in names["keys"])
    assert all(name.startswith(("valid", "test")) for name in names["queries"])
