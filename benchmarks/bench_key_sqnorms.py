"""key_sqnorms against the torch expressions for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import knnext


@dataclass(frozen=True)
class Shape:
    entries: int
    dim: int
    dtype: torch.dtype
    full: bool = False

    def __str__(self) -> str:
        return f"N{self.entries}-D{self.dim}-{self.dtype}".replace("torch.", "")


SHAPES = [
    Shape(65536, 1024, torch.float16),
    Shape(65536, 1024, torch.bfloat16, full=True),
    Shape(65536, 1024, torch.float32, full=True),
    Shape(400_000, 128, torch.float16, full=True),
]

IMPLEMENTATIONS = {
    "knnext": knnext.key_sqnorms,
    "torch_float_square_sum": lambda keys: keys.float().square().sum(1),
    "torch_vector_norm": lambda keys: torch.linalg.vector_norm(
        keys, dim=1, dtype=torch.float32
    ).square(),
}


def test_key_sqnorms(shape: Shape, device: str, implementation: str, measure) -> None:
    keys = torch.randn(shape.entries, shape.dim, device=device).to(shape.dtype)
    run = IMPLEMENTATIONS[implementation]
    torch.testing.assert_close(run(keys).double(), keys.double().square().sum(1), rtol=1e-5, atol=0)
    measure(
        lambda: run(keys),
        group=f"key_sqnorms {shape} {device}",
        device=device,
        flop=2.0 * keys.numel(),
        bytes_moved=float(keys.nbytes),
        shape=str(shape),
    )
