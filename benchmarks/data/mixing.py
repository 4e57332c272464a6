"""What the benchmarks of the mixing ops share: shapes, data, and the sums that peers write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.data.buffers import l2_bytes, rotations
from benchmarks.data.cases import dtype_name

VOCABULARIES = (33_344, 50_257, 128_256, 262_144)


@dataclass(frozen=True)
class Shape:
    queries: int
    k: int
    vocab_size: int
    logits: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"Q{self.queries}-k{self.k}-V{self.vocab_size}-{dtype_name(self.logits)}"

    def facts(self) -> dict[str, Any]:
        return {
            "Q": self.queries,
            "k": self.k,
            "V": self.vocab_size,
            "dtype": dtype_name(self.logits),
        }


_BFLOAT16 = torch.bfloat16
_CPU = [
    Shape(1, 1024, 33_344),
    Shape(256, 64, 50_257),
    Shape(1024, 1024, 33_344),
]
_FULL = [
    *[Shape(1024, 1024, v) for v in VOCABULARIES],
    *[Shape(1024, 1024, v, _BFLOAT16) for v in VOCABULARIES],
    *[Shape(q, 1024, 50_257) for q in (1, 8, 64, 256, 4096)],
    *[Shape(1024, k, 50_257) for k in (16, 64, 256, 2048, 4096)],
]
SHAPES = {
    "smoke": [Shape(3, 50, 1000), Shape(2, 64, 4096, _BFLOAT16)],
    "cpu": _CPU,
    "cuda": [
        *[Shape(1024, 1024, v) for v in VOCABULARIES],
        Shape(1024, 1024, 128_256, _BFLOAT16),
        Shape(1, 1024, 128_256, _BFLOAT16),
    ],
    "full cpu": [*_CPU, Shape(256, 1024, 128_256, _BFLOAT16), *_FULL[:2], *_FULL[8:]],
    "full cuda": _FULL,
}
#: Where no logits are read, their dtype makes no other shape.
SHAPES_WITHOUT_LOGITS = {
    name: [s for s in shapes if s.logits == torch.float32] for name, shapes in SHAPES.items()
}


@dataclass(frozen=True, eq=False)
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

    @property
    def neighbor_bytes(self) -> int:
        return self.distances.nbytes + self.tokens.nbytes

    def rows(self, count: int) -> Data:
        """The first rows in float64: what the truth is computed from."""
        head = (self.distances[:count].double(), self.tokens[:count], self.targets[:count])
        shape = Shape(len(head[0]), self.shape.k, self.vocab_size)
        return Data(shape, self.logits[:count].double(), *head)


@lru_cache(maxsize=1)
def make_data(
    shape: Shape, device: str, bytes_per_call: int, with_logits: bool = False
) -> tuple[Data, ...]:
    """Distances in order, as a search gives them; half the neighbors share 50 tokens.

    As many sets of buffers as turn the cache over, from what one call moves: one on a CPU. Without
    logits these are (Q, 0).
    """
    torch.compiler.reset()  # past eight shapes it would run eagerly and say nothing
    sets = rotations(bytes_per_call, l2_bytes(device)) if device == "cuda" else 1
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.rand(*sizes, device=device, generator=generator)

    rows, k = sets * shape.queries, shape.k
    distances = 900 + 100 * draw(rows, k).sort(1).values
    tokens = (draw(rows, k) * shape.vocab_size).long().clamp_(max=shape.vocab_size - 1)
    tokens = torch.where(draw(rows, k) < 0.5, tokens % 50, tokens)
    columns = shape.vocab_size if with_logits else 0
    logits = torch.randn(rows, columns, device=device, generator=generator)
    whole = (logits.to(shape.logits), distances, tokens, tokens[:, 0].contiguous())
    parts = zip(*(t.split(shape.queries) for t in whole), strict=True)
    return tuple(Data(shape, *part) for part in parts)


def scattered_softmax(data: Data) -> Tensor:
    weights = torch.softmax(-data.distances / data.temperature, 1)
    p_knn = torch.zeros(
        data.shape.queries, data.vocab_size, device=weights.device, dtype=weights.dtype
    )
    return p_knn.scatter_add_(1, data.tokens, weights)


@cache
def compiled(function: Any) -> Any:
    """Compiled once for all sets of buffers; a new shape compiles anew."""
    return torch.compile(function)
