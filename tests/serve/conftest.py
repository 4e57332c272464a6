from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.explore import small


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    small.make(folder)
    return folder


@pytest.fixture(scope="package")
def opened(folder: Path) -> Any:
    """A model, its tokenizer, its datastore and an exact index (tests/explore/small.py)."""
    return small.open_session(folder)


@pytest.fixture(scope="package")
def mixed(opened: Any) -> Any:
    from knnext.lm.knnlm import KNNLM

    return KNNLM(opened.model, opened.index, small.K, small.TEMPERATURE, small.LMBDA)


@pytest.fixture
def gated(opened: Any) -> Any:
    """The same, and its searches can be held and fail: its index is a `Gate`."""
    from knnext.lm.knnlm import KNNLM
    from tests.serve.asking import Gate

    gate = Gate(opened.index)
    return KNNLM(opened.model, gate, small.K, small.TEMPERATURE, small.LMBDA)


@pytest.fixture
def make_engine(mixed: Any, opened: Any) -> Iterator[Callable[..., Any]]:
    """Engines that end with the test."""
    from knnext.serve.engine import Engine

    made: list[Any] = []

    def make(**options: Any) -> Any:
        made.append(Engine(options.pop("mixed", mixed), opened.tokenizer, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.cancel()


@pytest.fixture(scope="module")
def engine(mixed: Any, opened: Any) -> Iterator[Any]:
    """For all tests of a module that leave it as it is."""
    from knnext.serve.engine import Engine

    engine = Engine(mixed, opened.tokenizer)
    yield engine
    engine.cancel()


@pytest.fixture(scope="module")
def app(engine: Any) -> Any:
    from tests.serve.posting import service_of

    return service_of(engine).app()


@pytest.fixture
def chatting(make_engine: Any, opened: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    from tests.serve.posting import TEMPLATE, service_of

    monkeypatch.setattr(opened.tokenizer, "chat_template", TEMPLATE, raising=False)
    return service_of(make_engine()).app()
