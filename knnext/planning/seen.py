"""A plan against what happens: the stages of a small datastore, predicted and then run.

``python -m knnext.planning seen DATASTORE --model M`` measures rates, takes rows of the datastore
and tokens for the model, runs each stage in a folder of its own, and prints how many times as long
it took as the plan said. Each stage is run some times and the quickest counts, as with rates.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from knnext.datastore import Datastore
from knnext.index import ExactIndex, FaissIndex, StoredCodes
from knnext.lm.hidden_states import hidden_states
from knnext.output import scratch_folder
from knnext.planning.job import Job
from knnext.planning.measure import Sizes, best, measure
from knnext.planning.model_shape import described, read_shape
from knnext.planning.placement import place
from knnext.planning.rates import Rates
from knnext.planning.search_time import local_search
from knnext.planning.stages import stages
from knnext.say import Say

_TOKENS, _BLOCK, _STRIDE = 1024, 512, 256
_QUERIES = (1, 16, 64, 256, 1024)
_LISTS = 256


def seen(
    path: str, model: str | None, say: Say, *, folder: str = ".", rows: int = 200_000
) -> list[tuple[str, float, float]]:
    """(stage, seconds predicted, seconds seen), each said as it is known."""
    store = Datastore.open(path)
    store = store.rows(0, min(rows, store.num_entries))
    found: list[tuple[str, float, float]] = []
    with scratch_folder(Path(folder) / ".knnext-seen") as work:
        rates = measure(Sizes(dim=store.dim), say, folder=work)
        say("")
        say(f"{'stage':44} seen / predicted")
        for name, predicted, took in _stages(store, model, rates, work):
            found.append((name, predicted, took))
            say(f"{name:44} {took / predicted:6.2f}")
    return found


def _stages(
    store: Datastore, model: str | None, rates: Rates, work: Path
) -> Iterator[tuple[str, float, float]]:
    dtype = str(store.dtype).removeprefix("torch.")
    shape = described(store.dim, 1, None)
    job = Job(len(store.keys), shape, dtype=dtype, index=f"IVF{_LISTS},PQ{max(1, store.dim // 16)}")
    if model is not None:
        yield from _forward(model, rates)

    def predicted(name: str, one: Job) -> float:
        where = place(one, rates.machine)
        stage = next(s for s in stages(one, where, rates.machine, rates) if s.name.startswith(name))
        assert stage.seconds is not None
        return stage.seconds

    keys, values = store.keys[:], store.values[:]
    copies = iter(range(1 << 30))

    def write() -> Datastore:
        target = work / f"copy-{next(copies)}"
        with Datastore.create(target, store.dim, store.dtype, key_layer=None) as made:
            made.append(keys, values)
        return Datastore.open(target)

    yield "write", predicted("write", job), best(write)
    copy = Datastore.open(work / "copy-0")
    with_codes = replace(job, codes=True)
    again = best(lambda: StoredCodes.build(copy, overwrite=True))
    yield "encode", predicted("encode", with_codes), again
    for by_codes in (False, True):
        yield from _searches(copy, with_codes if by_codes else job, rates)
    took: dict[str, float] = {}
    index = _build(copy, job, work / "index", took)
    yield "FAISS train and add", predicted("index t", job) + predicted("index a", job), took["all"]
    queries = copy.keys[:64].float()
    each = best(lambda: index.search(queries, 1024)) * 1000 / 64
    yield "FAISS search of 64 queries", predicted("FAISS", replace(job, nprobe=32)), each


def _forward(model: str, rates: Rates) -> Iterator[tuple[str, float, float]]:
    from knnext.lm.load import load_lm

    loaded, _ = load_lm(model, device="cuda" if torch.cuda.is_available() else "cpu")
    stream = torch.arange(_TOKENS + 1, device="cpu") % loaded.config.vocab_size

    def run() -> None:
        for _ in hidden_states(loaded, stream, block_size=_BLOCK, stride=_STRIDE, batch_size=1):
            pass

    # Of so few tokens the first window counts: two of them, and a window for each stride more.
    windows = 1 + (_TOKENS - _BLOCK) // _STRIDE
    flops = windows * _BLOCK * read_shape(model).flops(_BLOCK)
    yield "forward, from a stack of two blocks", flops / rates["forward"], best(run)


def _searches(store: Datastore, job: Job, rates: Rates) -> Iterator[tuple[str, float, float]]:
    exact = ExactIndex(store, codes=job.codes, resident_bytes=1 << 40)
    how = "codes" if job.codes else "keys"
    for count in _QUERIES:
        one = replace(job, queries=count)
        queries = store.keys[torch.arange(count, device="cpu") * (len(store.keys) // count)]
        predicted = local_search(one, place(one, rates.machine), rates).seconds
        took = best(partial(exact.search, queries, 1024))
        yield f"search by {how}, {count:,} queries, k 1,024", predicted, took


def _build(store: Datastore, job: Job, folder: Path, took: dict[str, float]) -> FaissIndex:
    start = time.perf_counter()
    index = FaissIndex.build(store, folder, job.factory, gpu=False)
    took["all"] = time.perf_counter() - start
    return index
