"""A text, the datastore that one process builds of it, and the same in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from knnext.corpus import TokenizedDocuments
from knnext.datastore import Datastore
from knnext.datastore.build import build_datastore
from tests.datastore.streams import LENGTHS, WINDOWS, some_tokenizer, stream
from tests.lm.tiny_models import tiny


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return some_tokenizer()


@pytest.fixture(scope="module")
def text() -> TokenizedDocuments:
    return stream(LENGTHS)


@pytest.fixture(scope="module")
def whole(tokenizer: Any, text: TokenizedDocuments, tmp_path_factory: Any) -> Datastore:
    path = tmp_path_factory.mktemp("whole") / "store"
    return build_datastore(tiny("gpt2"), tokenizer, text, path, **WINDOWS)


def make_parts(
    tokenizer: Any, text: TokenizedDocuments, path: Path, numbers: Any, count: int, **options: Any
) -> Datastore:
    for number in numbers:
        store = build_datastore(
            tiny("gpt2"), tokenizer, text, path, part=(number, count), **{**WINDOWS, **options}
        )
    return store
