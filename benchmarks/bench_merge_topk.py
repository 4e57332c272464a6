"""merge_topk against torch.topk, which leaves ties and padding as they fall."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import knnext


@dataclass(frozen=True)
class Shape:
    queries: int
    width: int
    k: int
    full: bool = False

    def __str__(self) -> str:
        return f"Q{self.queries}-m{self.width}-k{self.k}"


SHAPES = [
    Shape(1024, 2048, 1024),
    Shape(1024, 8192, 1024),
    Shape(1, 65536, 1024, full=True),
    Shape(4096, 128, 64, full=True),
]


def torch_topk(distances, indices, k):
    values, at = distances.topk(k, largest=False)
    return values, indices.gather(1, at)


IMPLEMENTATIONS = {"knnext": knnext.merge_topk, "torch_topk": torch_topk}


def test_merge_topk(shape: Shape, device: str, implementation: str, measure) -> None:
    distances = torch.rand(shape.queries, shape.width, device=device)
    indices = torch.randint(0, 1 << 40, distances.shape, device=device)
    run = IMPLEMENTATIONS[implementation]
    want = distances.sort(1).values[:, : shape.k]
    torch.testing.assert_close(run(distances, indices, shape.k)[0], want, rtol=0, atol=0)
    measure(
        lambda: run(distances, indices, shape.k),
        group=f"merge_topk {shape} {device}",
        device=device,
        bytes_moved=12.0 * shape.queries * (shape.width + shape.k),
        shape=str(shape),
    )
