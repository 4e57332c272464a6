"""`search_stream` scores nothing that is stored, and reads windows as the datastore's were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from knnext.corpus import Document
from knnext.datastore import Datastore
from knnext.datastore.build import build_datastore
from knnext.datastore.overlap import OverlapError
from knnext.evaluation import search_stream
from knnext.index import ExactIndex, Filter
from knnext.lm.train import train_tokenizer
from tests.datastore.test_overlap import document, stream
from tests.lm.tiny_models import tiny

WINDOWS: dict[str, Any] = {"block_size": 16, "stride": 8}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([Document("a", "some text " * 20)], 270)


@pytest.fixture(scope="module")
def store(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    text = stream({f"d{i}": document(i) for i in range(4)})
    path = tmp_path_factory.mktemp("stored") / "store"
    return build_datastore(tiny("gpt2"), tokenizer, text, path, bos_each_window=True, **WINDOWS)


def renamed() -> Any:
    return stream({"other": document(2), "n9": document(9), "n10": document(10)})


@pytest.mark.parametrize("several", [False, True])
def test_a_stored_text_is_refused(store: Datastore, several: bool) -> None:
    index = ExactIndex(store)
    indexes = {"l2": index, "ip": ExactIndex(store, metric="ip")} if several else index
    text = renamed()
    with pytest.raises(OverlapError, match=r"1 of the 3 documents .* \(other\)") as caught:
        search_stream(tiny("gpt2"), indexes, text, k=3, **WINDOWS)
    assert caught.value.names == ["other"]
    search_stream(tiny("gpt2"), indexes, text, k=3, allow_overlap=True, **WINDOWS)


def test_what_is_excluded_from_the_search_may_be_scored(store: Datastore) -> None:
    index, text = ExactIndex(store), renamed()
    search_stream(tiny("gpt2"), index, text, k=3, exclude_documents=[2], **WINDOWS)
    each = torch.full((len(text) - 1,), 2)
    search_stream(tiny("gpt2"), index, text, k=3, exclude_documents=each, **WINDOWS)
    with pytest.raises(OverlapError):
        search_stream(tiny("gpt2"), index, text, k=3, exclude_documents=[1], **WINDOWS)


def test_what_an_index_leaves_out_of_all_searches_may_be_scored(store: Datastore) -> None:
    index, text = ExactIndex(store), renamed()
    narrow = index.restricted(Filter(exclude_documents=["d2"]))
    found = search_stream(tiny("gpt2"), narrow, text, k=3, **WINDOWS)
    assert not (store.document_of(found.indices) == 2).any()
    with pytest.raises(OverlapError):
        search_stream(tiny("gpt2"), {"narrow": narrow, "all": index}, text, k=3, **WINDOWS)
    with pytest.raises(OverlapError):  # a part of it may still be found
        half = Filter(exclude_rows=[int(store.document_offsets[2])])
        search_stream(tiny("gpt2"), index.restricted(half), text, k=3, **WINDOWS)


def test_windows_begin_as_the_datastores_did(store: Datastore, tokenizer: Any) -> None:
    text = stream({f"n{i}": document(i) for i in range(9, 14)})
    bos = store.meta.origin["bos"] if store.meta.origin else None
    assert bos == tokenizer.bos_token_id

    def log_p(**options: Any) -> torch.Tensor:
        return search_stream(
            tiny("gpt2"), ExactIndex(store), text, k=3, **WINDOWS, **options
        ).log_p_lm

    assert torch.equal(log_p(), log_p(bos=bos))
    assert not torch.equal(log_p(), log_p(bos=None))
