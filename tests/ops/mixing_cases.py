"""Neighbors to mix with: random ones, and the same drawn by hypothesis with every trap in them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

INF = float("inf")
NAN = float("nan")
ROOT = Path(__file__).resolve().parents[2]


def neighbors(
    rows: int, k: int, vocab_size: int, *, spread: float = 30.0, base: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(distances, tokens): sorted, tokens repeated, some padding, the second row nothing but."""
    distances = base + spread * torch.rand(rows, k).sort(1).values
    tokens = torch.randint(0, vocab_size, (rows, k))
    near = torch.rand(rows, k) < 0.3  # these fall on few tokens
    tokens = torch.where(near, tokens % min(5, vocab_size), tokens)
    padding = torch.rand(rows, k) < 0.1
    if rows > 1:
        padding[1] = True
    return distances.masked_fill(padding, INF), tokens.masked_fill(padding, -1)


@st.composite
def drawn_neighbors(draw: st.DrawFn) -> tuple[Tensor, Tensor, float, int]:
    """(distances, tokens, temperature, vocab_size), small, with ties, infinities and padding."""
    rows, k = draw(st.integers(0, 4)), draw(st.integers(0, 40))
    vocab_size = draw(st.integers(1, 12))
    near = st.floats(-50, 50, width=32)
    distance = near | near | st.sampled_from([0.0, 1.0, 1e4, 1e30, INF])
    token = st.integers(-1, vocab_size - 1)
    distances = draw(st.lists(distance, min_size=rows * k, max_size=rows * k))
    tokens = draw(st.lists(token, min_size=rows * k, max_size=rows * k))
    temperature = draw(st.floats(0.1, 1e3))
    return (
        torch.tensor(distances, dtype=torch.float32).reshape(rows, k),
        torch.tensor(tokens, dtype=torch.int64).reshape(rows, k),
        temperature,
        vocab_size,
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits_whatever_the_threads(run: Callable[[], Tensor]) -> None:
    want = run()
    for count in (1, 2, 3, 7):
        with threads(count):
            assert torch.equal(run(), want), f"{count} threads"


def assert_compiles(loss: Callable[..., Tensor], make: Callable[[int], list[Tensor]]) -> None:
    """One graph, static and dynamic shapes, value and gradients as without the compiler."""
    for dynamic in (False, True):
        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for rows in (3, 6):
            args = make(rows)
            wanted = [a for a in args if a.requires_grad]
            value, plain = compiled(*args), loss(*args)
            torch.testing.assert_close(value, plain)
            got = torch.autograd.grad(value, wanted)
            torch.testing.assert_close(got, torch.autograd.grad(plain, wanted))


def run_python(code: str, **env: str) -> str:
    """Standard output of a fresh interpreter in the project's root."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
