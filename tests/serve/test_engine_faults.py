"""Texts that are refused, given up or go wrong: what is told, and that others go on."""

from __future__ import annotations

import time
from typing import Any

import pytest

from knnext.serve.asked import Asked, Prompt
from knnext.serve.engine import Engine
from knnext.serve.errors import Refused
from knnext.serve.mixer import Mixture
from tests.explore.small import CONTEXT, LMBDA, TEMPERATURE, K
from tests.serve.asking import PATIENCE, PROMPTS, Asking, ask, asked


def test_a_full_queue(make_engine: Any, gated: Any) -> None:
    engine = make_engine(mixed=gated, max_batch=1, queue=3)
    gated.index.hold()
    first = ask(engine, prompt="the", max_tokens=2)
    gated.index.held()
    waiting = [ask(engine, prompt="fox", max_tokens=1), ask(engine, prompt="a", max_tokens=1, n=2)]
    with pytest.raises(Refused, match="3 texts are waiting") as refused:
        ask(engine, prompt="dog")
    assert refused.value.status == 429 and 1 <= int(refused.value.headers["Retry-After"]) <= 60
    waiting[0].job.cancelled = True  # who has gone makes room at once
    late = ask(engine, prompt="dog", max_tokens=1)
    gated.index.open.set()
    for asking in (first, waiting[1], late):
        asking.pieces()
    with pytest.raises(Refused, match="at most 3 prompts"):
        ask(engine, prompt=["fox"] * 4)
    request = Asked([Prompt([1])] * 4, 1, CONTEXT, Mixture(K, TEMPERATURE, LMBDA))
    with pytest.raises(Refused, match="at most 3 texts"):
        Asking(engine, request)


def test_who_has_gone_is_not_written_for(make_engine: Any, gated: Any) -> None:
    engine = make_engine(mixed=gated)
    gated.index.hold()
    gone = ask(engine, prompt="the", max_tokens=20)
    gated.index.held()
    stays = ask(engine, prompt="fox", max_tokens=3)
    gone.job.cancelled = True
    gated.index.open.set()
    assert len(stays.ids()[0]) == 3
    assert gone.told.empty() and gated.index.sizes[1:] == [1, 1, 1]


def test_what_takes_too_long_is_given_up(make_engine: Any, gated: Any) -> None:
    """Also while it waits; others go on."""
    engine = make_engine(mixed=gated, max_batch=1, seconds=1e-3)
    gated.index.hold()
    asking, waits = ask(engine, prompt="the", max_tokens=20), ask(engine, prompt="a")
    time.sleep(0.01)
    gated.index.open.set()
    for late in (asking, waits):
        with pytest.raises(Refused, match="longer than") as refused:
            late.pieces()
        assert refused.value.status == 504 and refused.value.headers["x-should-retry"] == "false"
    engine.seconds = PATIENCE
    assert ask(engine, prompt="fox", max_tokens=2).ids()


def test_a_step_that_fails_fails_those_in_it(
    make_engine: Any, gated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(mixed=gated)
    gated.index.failing = True
    asking = ask(engine, prompt=["the", "fox"], max_tokens=3)
    with pytest.raises(Refused, match="RuntimeError: the disk is gone") as refused:
        asking.pieces()
    assert refused.value.status == 500 and asking.told.empty()  # once a request
    gated.index.failing = False
    assert len(ask(engine, prompt="the", max_tokens=3).ids()[0]) == 3
    assert "the disk is gone" in caplog.text


def test_a_text_that_the_model_has_no_number_for_fails_alone(
    make_engine: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in half precision, where one text's numbers overflow."""
    engine = make_engine()
    (fox,) = opened.tokenizer(" fox", add_special_tokens=False)["input_ids"][-1:]
    wanted = ask(engine, prompt=[[7, 8], [7, 9]], max_tokens=4).ids()
    read = engine.reader._read

    def spoiled(rows: Any, new: Any, whole: bool) -> Any:
        states, logits = read(rows, new, whole)
        for text, line in zip(new, logits, strict=True):
            if text[-1] == fox:
                line.fill_(float("nan"))
        return states, logits

    monkeypatch.setattr(engine.reader, "_read", spoiled)
    good, bad = ask(engine, prompt=[[7, 8], [7, 9]], max_tokens=4), ask(engine, prompt=[[7, fox]])
    with pytest.raises(Refused, match="NaN"):
        bad.pieces()
    assert good.ids() == wanted


def test_a_panic_is_told_and_leaves_the_thread_alive(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a library in Rust raises is no Exception."""

    class Panic(BaseException):
        pass

    engine = make_engine()
    begin, step = engine.reader.begin, engine.reader.step

    def panic(*args: Any, **options: Any) -> Any:
        raise Panic("index out of bounds")

    for name in ("begin", "step"):
        monkeypatch.setattr(engine.reader, name, panic)
        with pytest.raises(Refused, match="Panic: index out of bounds"):
            ask(engine, prompt="the", max_tokens=3).pieces()
        monkeypatch.setattr(engine.reader, "begin", begin)
        monkeypatch.setattr(engine.reader, "step", step)
    assert len(ask(engine, prompt="the", max_tokens=3).ids()[0]) == 3


def test_a_prompt_that_cannot_be_read_fails_alone(
    make_engine: Any, gated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(mixed=gated)
    gated.index.hold()
    good = ask(engine, prompt="the", max_tokens=4)
    gated.index.held()
    begin = engine.reader.begin

    def fail(*args: Any, **options: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(engine.reader, "begin", fail)
    bad = ask(engine, prompt="fox")
    gated.index.open.set()
    with pytest.raises(Refused, match="MemoryError"):
        bad.pieces()
    assert len(good.ids()[0]) == 4
    monkeypatch.setattr(engine.reader, "begin", begin)
    assert ask(engine, prompt="fox", max_tokens=1).ids()


def test_closing_lets_those_end_who_have_begun(make_engine: Any, gated: Any) -> None:
    engine = make_engine(mixed=gated, max_batch=1)
    gated.index.hold()
    askings = [ask(engine, prompt="the", max_tokens=2), ask(engine, prompt="fox", max_tokens=2)]
    gated.index.held()
    engine.close()
    with pytest.raises(Refused, match="shutting down"):
        ask(engine, prompt="a")
    assert not engine.idle
    gated.index.open.set()
    assert [len(asking.ids()[0]) for asking in askings] == [2, 2]


def test_cancelling_ends_all(make_engine: Any, gated: Any) -> None:
    engine = make_engine(mixed=gated, max_batch=1)
    gated.index.hold()
    askings = [ask(engine, prompt="the", max_tokens=20), ask(engine, prompt="fox")]
    gated.index.held()
    engine.cancel()
    gated.index.open.set()
    for asking in askings:
        with pytest.raises(Refused, match="shutting down"):
            asking.pieces()


def test_requests_of_nobody_leave_nothing(make_engine: Any) -> None:
    engine: Engine = make_engine()
    ask(engine, prompt=PROMPTS, max_tokens=5).pieces()
    end = time.monotonic() + PATIENCE
    while not engine.idle:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert (engine.num_live, engine.num_waiting) == (0, 0)
    assert engine.texts_ended == len(PROMPTS)
    assert asked(engine, prompt="a").num_texts == 1
