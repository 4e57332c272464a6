"""The next token from log p: the likeliest, or one drawn by a generator of the text's own."""

from __future__ import annotations

import random

import torch
from torch import Tensor


def next_token(
    log_p: Tensor,
    generator: torch.Generator | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> int:
    """The likeliest of (V,) log p, or with a generator, which is on the CPU, one drawn.

    Args:
        temperature: above 0; log p is divided by it.
        top_p: of the likeliest tokens only as many as together have this much, at least one.

    ArithmeticError where log p is NaN.
    """
    likeliest = log_p.max()
    if likeliest.isnan():
        raise ArithmeticError("log p of the next token is NaN: what the model gives is no number")
    if generator is None:
        return int(log_p.argmax())
    # From the likeliest on: it stays at 0 where a small temperature drives all others to -inf.
    p = ((log_p - likeliest).double().cpu() / temperature).softmax(0)
    if top_p < 1:
        ordered, places = p.sort(descending=True, stable=True)
        beyond = ordered.cumsum(0) - ordered >= top_p
        beyond[0] = False
        p[places[beyond]] = 0
    return int(torch.multinomial(p, 1, generator=generator))


def generator_of(seed: int | None, number: int) -> torch.Generator:
    """Of the n-th text that one seed is for; without a seed any."""
    bits = random.SystemRandom() if seed is None else random.Random(f"{seed}:{number}")
    return torch.Generator(device="cpu").manual_seed(bits.getrandbits(63))
