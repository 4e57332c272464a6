"""What every op keeps on a GPU: the same bits each time, in a graph, and on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Results = Tensor | tuple[Tensor, ...]


def _tensors(results: Results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def same(got: Results, want: Results) -> bool:
    pairs = zip(_tensors(got), _tensors(want), strict=True)
    return all(torch.equal(g, w) for g, w in pairs)


def assert_same_bits_a_hundred_times(run: Callable[[], Results]) -> None:
    first = run()
    assert all(same(run(), first) for _ in range(100))


def captured(run: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
    """The call as a graph, and the tensors that a replay fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    return graph, got


def assert_replays(run: Callable[[], Results]) -> None:
    want = run()
    graph, got = captured(run)
    for _ in range(3):
        for tensor in _tensors(got):
            tensor.zero_()
        graph.replay()
        assert same(got, want)


def assert_kept_to_a_side_stream(run: Callable[[], Results]) -> None:
    want = run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # work queued elsewhere would overtake this
        fillers = [torch.empty_like(tensor).fill_(7) for tensor in _tensors(want)]
        got = run()
        ready = stream.record_event()
    ready.synchronize()
    assert same(got, want) and all(filler.eq(7).all() for filler in fillers)
