"""Tokens as text while they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from knnext.evaluation.prompt import pieces
from knnext.serve.sampling import generator_of, next_token
from knnext.serve.speller import Names, Speller, Stops
from tests.explore.small import TEXT


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_what_is_spelled_is_what_is_decoded(opened: Any, first: int, cut: int) -> None:
    """Character by character, also where a character is spread over tokens or cut at the end."""
    ids = opened.tokenizer(f"{TEXT} é漢🦊", add_special_tokens=False)["input_ids"]
    ids = ids[: len(ids) - cut]
    speller = Speller(opened.tokenizer, ids[:first])
    parts = [speller.add(token) for token in ids[first:]]
    assert "".join(parts) + speller.rest() == "".join(pieces(opened.tokenizer, ids, first))
    assert all("\ufffd" not in part for part in parts)
    assert speller.rest() == ""


@pytest.mark.parametrize(
    ("strings", "text", "left"),
    [
        ((), "abc", "abc"),
        (("b",), "abc", "a"),
        (("abc", "b"), "xabc", "xa"),  # the first that is whole, not the first that begins
        (("c", "abc", "bc"), "xabc", "x"),
        (("aab",), "aaaab", "aa"),
        (("xyz",), "abxy", "abxy"),
        (("abc",), "abc", ""),
        (("\n\n", "."), "one\n two.\n\n", "one\n two"),
        (("漢字",), "a漢b漢字", "a漢b"),
    ],
)
def test_stops_do_not_depend_on_how_the_text_comes(
    strings: tuple[str, ...], text: str, left: str
) -> None:
    for size in (1, 2, len(text)):
        stops, out = Stops(strings), ""
        for start in range(0, len(text), size):
            if not stops.met:
                out += stops.add(text[start : start + size])
                assert left.startswith(out)  # what was given out is never taken back
        assert out + stops.rest() == left
        assert stops.met == (left != text)


def test_names_tell_tokens_apart(opened: Any) -> None:
    names = Names(opened.tokenizer)
    ids = opened.tokenizer(" the fox", add_special_tokens=False)["input_ids"]
    assert "".join(names[token] for token in ids) == " the fox"
    assert names[opened.tokenizer.eos_token_id] == opened.tokenizer.eos_token
    known = [names[token] for token in range(len(opened.tokenizer))]
    assert len(set(known)) == len(known) and all(known)


# Drawing


def test_drawing_follows_p() -> None:
    log_p = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    generator = generator_of(0, 0)
    drawn = torch.tensor([next_token(log_p, generator) for _ in range(2000)])
    shares = drawn.bincount(minlength=4) / 2000
    assert torch.allclose(shares, log_p.exp(), atol=0.05) and shares[3] == 0
    cold = [next_token(log_p, generator, temperature=0.01) for _ in range(50)]
    assert set(cold) == {0}
    for temperature in (1e-30, 1e-310, 5e-324):  # by which all log p would be -inf
        assert {next_token(log_p, generator, temperature) for _ in range(5)} == {0}


@pytest.mark.parametrize("drawn", [False, True])
def test_what_is_no_number_is_no_token(drawn: bool) -> None:
    log_p = torch.tensor([-0.5, float("nan"), -1.0])
    with pytest.raises(ArithmeticError, match="NaN"):
        next_token(log_p, generator_of(0, 0) if drawn else None)


@pytest.mark.parametrize(
    ("top_p", "left"),
    [(0.0, {0}), (0.49, {0}), (0.51, {0, 1}), (0.81, {0, 1, 2})],
)
def test_top_p_keeps_the_likeliest(top_p: float, left: set[int]) -> None:
    log_p = torch.tensor([0.5, 0.3, 0.2]).double().log()
    generator = generator_of(1, 0)
    assert {next_token(log_p, generator, top_p=top_p) for _ in range(200)} == left


def test_seeds_are_kept_apart() -> None:
    first = [generator_of(seed, copy).initial_seed() for seed in (0, 1, -1) for copy in (0, 1)]
    again = [generator_of(seed, copy).initial_seed() for seed in (0, 1, -1) for copy in (0, 1)]
    assert first == again and len(set(first)) == 6
    assert generator_of(None, 0).initial_seed() != generator_of(None, 0).initial_seed()
