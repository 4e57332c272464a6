"""rescore against the gather that torch needs for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import knnext


@dataclass(frozen=True)
class Shape:
    queries: int
    entries: int
    dim: int
    width: int
    dtype: torch.dtype = torch.float16
    full: bool = False

    def __str__(self) -> str:
        text = f"Q{self.queries}-N{self.entries}-D{self.dim}-m{self.width}-{self.dtype}"
        return text.replace("torch.", "")


SHAPES = [
    Shape(64, 65536, 1024, 1024),
    Shape(256, 400_000, 128, 1024),
    Shape(1024, 65536, 1024, 1024, full=True),
]


def torch_gather(queries, keys, indices):
    """(Q, m, D) in float32 is held, here in batches of 16 queries."""
    parts = []
    for q, i in zip(queries.split(16), indices.split(16), strict=True):
        rows = keys[i].float()
        parts.append((q.float()[:, None] - rows).square().sum(-1))
    return torch.cat(parts)


IMPLEMENTATIONS = {"knnext": knnext.rescore, "torch_gather": torch_gather}


def test_rescore(shape: Shape, device: str, implementation: str, measure) -> None:
    queries = torch.randn(shape.queries, shape.dim, device=device).to(shape.dtype)
    keys = torch.randn(shape.entries, shape.dim, device=device).to(shape.dtype)
    indices = torch.randint(0, shape.entries, (shape.queries, shape.width), device=device)
    run = IMPLEMENTATIONS[implementation]
    want = (queries[:2].double()[:, None] - keys[indices[:2]].double()).square().sum(-1)
    torch.testing.assert_close(run(queries, keys, indices)[:2].double(), want, rtol=1e-5, atol=0)
    pairs = shape.queries * shape.width
    measure(
        lambda: run(queries, keys, indices),
        group=f"rescore {shape} {device}",
        device=device,
        flop=3.0 * pairs * shape.dim,
        bytes_moved=float(pairs * shape.dim * keys.element_size()),
        rounds=5,
        shape=str(shape),
    )
