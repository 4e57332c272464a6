"""What the benchmarks of the mixing ops share: shapes, data, and the sums that peers write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    queries: int
    k: int
    vocab_size: int
    logits: torch.dtype = torch.float32
    full: bool = False

    def __str__(self) -> str:
        text = f"Q{self.queries}-k{self.k}-V{self.vocab_size}-{self.logits}"
        return text.replace("torch.", "")


SHAPES = [
    Shape(1, 1024, 33344),
    Shape(1024, 1024, 33344),
    Shape(1024, 1024, 33344, torch.bfloat16, full=True),
    Shape(1024, 64, 50257, full=True),
    Shape(256, 1024, 262144, torch.bfloat16, full=True),
]


@dataclass(frozen=True)
class Data:
    shape: Shape
    logits: Tensor
    distances: Tensor
    tokens: Tensor
    targets: Tensor
    temperature: float = 10.0
    lmbda: float = 0.25

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def output_bytes(self) -> int:
        return self.shape.queries * self.shape.vocab_size * 4


@lru_cache(maxsize=1)
def make_data(shape: Shape, device: str) -> Data:
    """Distances in order, as a search gives them; half the neighbors share 50 tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.rand(*sizes, device=device, generator=generator)

    rows, k = shape.queries, shape.k
    distances = 900 + 100 * draw(rows, k).sort(1).values
    tokens = (draw(rows, k) * shape.vocab_size).long()
    tokens = torch.where(draw(rows, k) < 0.5, tokens % 50, tokens)
    logits = torch.randn(rows, shape.vocab_size, device=device, generator=generator)
    targets = tokens[:, 0].contiguous()
    return Data(shape, logits.to(shape.logits), distances, tokens, targets)


def scattered_softmax(data: Data) -> Tensor:
    weights = torch.softmax(-data.distances / data.temperature, 1)
    p_knn = torch.zeros(data.shape.queries, data.vocab_size, device=weights.device)
    return p_knn.scatter_add_(1, data.tokens, weights)
