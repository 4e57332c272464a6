"""KNNLM from several threads, and the base model beside it: each call gets its own answer."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from knnext.lm.knnlm import KNNLM
from tests.lm.test_knnlm import greedy, index_of
from tests.lm.tiny_models import num_hooks, random_tokens, tiny, transformers

THREADS = 4


@pytest.fixture(autouse=True)
def hurried_switches() -> Iterator[None]:
    """Threads take turns five hundred times as often, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Players:
    """One base model, two KNNLMs over it with other stores and layers, and what each should say."""

    def __init__(self, name: str) -> None:
        self.model = tiny(name)
        self.lms = [
            KNNLM(self.model, index_of(self.model, random_tokens(60)), 4, 0.5, 0.6),
            KNNLM(
                self.model, index_of(self.model, random_tokens(50, seed=8), key_layer="ffn"), 6, 2.0
            ),
        ]
        self.inputs = [random_tokens(n, seed=n)[None] for n in (5, 8, 11)]
        with torch.no_grad():
            self.raw = [self.model(input_ids=ids).logits for ids in self.inputs]
            self.mixed = [[lm(input_ids=i, labels=i) for i in self.inputs] for lm in self.lms]
        self.raw_text = [greedy(self.model, ids, 4) for ids in self.inputs]
        self.text = [[greedy(lm, ids, 4) for ids in self.inputs] for lm in self.lms]

    def calls(self) -> dict[str, Callable[[int, int], bool]]:
        return {
            "raw": lambda i, _: torch.equal(self.model(self.inputs[i]).logits, self.raw[i]),
            "raw_generate": lambda i, _: torch.equal(
                greedy(self.model, self.inputs[i], 4), self.raw_text[i]
            ),
            "forward": lambda i, lm: torch.equal(
                self.lms[lm](self.inputs[i]).logits, self.mixed[lm][i].logits
            ),
            "generate": lambda i, lm: torch.equal(
                greedy(self.lms[lm], self.inputs[i], 4), self.text[lm][i]
            ),
            "attached": self.attached,
            "failing": self.failing,
            "raw_failing": lambda *_: fails(self.model),
        }

    def attached(self, i: int, lm: int) -> bool:
        """Nested blocks of two KNNLMs: the innermost counts, and the outer one comes back."""
        ids, other = self.inputs[i], 1 - lm
        with self.lms[lm].attached() as model:
            output = model(input_ids=ids, labels=ids)
            good = torch.equal(output.logits, self.mixed[lm][i].logits)
            good &= torch.equal(output.loss, self.mixed[lm][i].loss)
            with self.lms[other].attached():
                good &= torch.equal(model(ids).logits, self.mixed[other][i].logits)
            good &= torch.equal(self.lms[other](ids).logits, self.mixed[other][i].logits)
            return good and torch.equal(model(ids).logits, self.mixed[lm][i].logits)

    def failing(self, i: int, lm: int) -> bool:
        with self.lms[lm].attached() as model:
            return fails(model) and torch.equal(
                model(self.inputs[i]).logits, self.mixed[lm][i].logits
            )


def fails(model: Any) -> bool:
    """A call that breaks in the middle, between what puts the keys aside and what reads them."""
    with pytest.raises(IndexError, match="out of range"):
        model(input_ids=torch.tensor([[5, 10_000]]))
    return True


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return [done.result(timeout=300) for done in [pool.submit(work, i) for i in range(THREADS)]]


def many(calls: list[Callable[[int, int], bool]], count: int) -> Callable[[int], list[str]]:
    def work(seed: int) -> list[str]:
        draw, wrong = random.Random(seed), []
        with torch.no_grad():
            for _ in range(count):
                call, i, lm = draw.choice(calls), draw.randrange(3), draw.randrange(2)
                if not call(i, lm):
                    wrong.append(f"{call} of input {i} by KNNLM {lm}")
        return wrong

    return work


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_kind_of_call_at_once(name: str) -> None:
    players = Players(name)
    work = many(list(players.calls().values()), 12)
    assert in_threads(work) == [[]] * THREADS
    assert num_hooks(players.model) == 0


@pytest.mark.parametrize("kind", ["forward", "generate", "attached"])
def test_one_kind_of_call_in_every_thread(kind: str) -> None:
    players = Players("gpt2")
    assert in_threads(many([players.calls()[kind]], 8)) == [[]] * THREADS


def test_the_base_is_raw_while_another_thread_holds_a_block_open() -> None:
    players, ids = Players("gpt2"), random_tokens(5, seed=5)[None]
    opened, seen = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def hold() -> None:
        with players.lms[0].attached() as model, torch.no_grad():
            opened.set()
            assert seen.wait(60)
            found.append(model(ids).logits)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert opened.wait(60)
        with torch.no_grad():
            assert torch.equal(players.model(ids).logits, players.raw[0])
    finally:
        seen.set()
        thread.join(60)
    assert torch.equal(found[0], players.mixed[0][0].logits)


def test_the_base_is_raw_beside_a_search() -> None:
    """The call in the other thread is made in the very middle of a KNNLM's own."""
    players = Players("llama")
    lm, ids = players.lms[0], players.inputs[0]
    search, beside = lm.index.search, []

    def call_the_base() -> None:
        with torch.no_grad():
            beside.append(torch.equal(players.model(ids).logits, players.raw[0]))

    def searching(*args: Any) -> Any:
        thread = threading.Thread(target=call_the_base)
        thread.start()
        thread.join(60)
        return search(*args)

    lm.index.search = searching
    with torch.no_grad():
        assert torch.equal(lm(ids).logits, players.mixed[0][0].logits)
    assert torch.equal(greedy(lm, ids, 4), players.text[0][0])
    assert beside == [True] * 5


def test_a_streamer_in_a_thread_and_the_base_beside_it() -> None:
    players, ids = Players("gpt2"), random_tokens(8, seed=8)[None]

    class Words:
        def decode(self, tokens: Any, **_: Any) -> str:
            return "".join(f"{int(token)} " for token in tokens)

    streamer = transformers.TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    lm = players.lms[0]
    thread = threading.Thread(
        target=lm.generate, args=(ids,), kwargs={**options, "streamer": streamer}
    )
    thread.start()
    heard = ""
    for piece in streamer:
        heard += piece
        with torch.no_grad():
            assert torch.equal(players.model(ids).logits, players.raw[1])
    thread.join(60)
    assert heard.split() == [str(int(token)) for token in greedy(lm, ids, 8)[0, 8:]]


def test_a_knnlm_is_made_in_each_thread() -> None:
    model, ids = tiny("gpt2"), random_tokens(8)[None]
    index = index_of(model, random_tokens(60))
    with torch.no_grad():
        expected = KNNLM(model, index, 4)(ids).logits

    def work(_: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(KNNLM(model, index, 4)(ids).logits, expected) for _ in range(5))

    assert all(in_threads(work))


def test_tasks_of_one_thread_do_not_meet() -> None:
    """An asyncio server: while one task awaits inside a block, another calls the base."""
    players, ids = Players("gpt2"), random_tokens(5, seed=5)[None]

    def logits(model: Any) -> Tensor:
        with torch.no_grad():  # a thread's own setting
            found: Tensor = model(ids).logits
        return found

    async def lent(lm: int) -> bool:
        with players.lms[lm].attached() as model:
            await asyncio.sleep(0)
            good = torch.equal(logits(model), players.mixed[lm][0].logits)
            # In another thread, but in this task's name.
            return good and torch.equal(
                await asyncio.to_thread(logits, model), players.mixed[lm][0].logits
            )

    async def raw() -> bool:
        await asyncio.sleep(0)
        return torch.equal(logits(players.model), players.raw[0])

    async def together() -> list[bool]:
        return await asyncio.gather(*(lent(n % 2) for n in range(4)), raw(), raw())

    assert all(asyncio.run(together()))
    assert num_hooks(players.model) == 0


def test_blocks_may_end_in_another_order() -> None:
    players, ids = Players("gpt2"), random_tokens(5, seed=5)[None]
    first, second = ExitStack(), ExitStack()
    model = first.enter_context(players.lms[0].attached())
    second.enter_context(players.lms[1].attached())
    with torch.no_grad():
        first.close()
        assert torch.equal(model(ids).logits, players.mixed[1][0].logits)
        second.close()
        assert torch.equal(model(ids).logits, players.raw[0])
    assert num_hooks(model) == 0


def test_a_block_inside_generate_has_all_positions() -> None:
    """generate reads the last position only; a forward call in the middle of it reads all."""
    players, ids, seen = Players("gpt2"), random_tokens(5, seed=5)[None], []

    def look(_: Tensor, scores: Tensor) -> Tensor:
        with torch.no_grad():
            seen.append(torch.equal(players.lms[0](ids).logits, players.mixed[0][0].logits))
        return scores

    processors = transformers.LogitsProcessorList([look])
    text = greedy(players.lms[0], ids, 4, logits_processor=processors)
    assert torch.equal(text, players.text[0][0]) and seen == [True] * 4


def test_lmbda_0_is_the_base_also_inside_a_block() -> None:
    players = Players("gpt2")
    nothing = KNNLM(players.model, players.lms[0].index, 4, lmbda=0.0)
    with players.lms[0].attached():
        assert torch.equal(greedy(nothing, players.inputs[0], 4), players.raw_text[0])


def test_data_parallel_is_refused() -> None:
    players, ids = Players("gpt2"), random_tokens(5)[None]
    with players.lms[0].attached() as model:
        replica = model._replicate_for_data_parallel()
        with pytest.raises(RuntimeError, match="DataParallel"):
            replica(ids)


@pytest.mark.parametrize("layer", ["att", "ffn", "module:transformer.h.1:output"])
def test_keys_are_made_beside_other_calls(layer: str) -> None:
    """Finding the layer and reading keys use hooks too: they are for their own thread's calls."""
    model, tokens = tiny("gpt2"), random_tokens(60)
    other = random_tokens(9, seed=4)[None]
    with torch.no_grad():
        logits = model(other).logits
    expected = index_of(model, tokens, key_layer=layer).keys
    done = threading.Event()

    def call_the_base() -> bool:
        with torch.no_grad():
            good = torch.equal(model(other).logits, logits)
            while good and not done.is_set():
                good = torch.equal(model(other).logits, logits)
        return good

    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(call_the_base) for _ in range(2)]
        try:
            for _ in range(4):
                assert torch.equal(index_of(model, tokens, key_layer=layer).keys, expected)
        finally:
            done.set()
        assert all(caller.result(timeout=60) for caller in callers)
