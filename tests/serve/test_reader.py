"""Texts side by side give what each gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from knnext.serve.reader import Reader, Rows
from tests.lm.tiny_models import num_hooks, random_tokens, tiny

#: Models that can read together: positions learned, turned and sloped, blocks of several kinds.
TOGETHER = ("gpt2", "llama", "mistral", "opt", "bloom", "gemma2", "falcon", "mpt", "gptj")


def texts(*lengths: int) -> list[list[int]]:
    return [random_tokens(length, seed=length).tolist() for length in lengths]


def alone(reader: Reader, text: list[int], more: list[int]) -> list[torch.Tensor]:
    """Logits after the text and after each token more, each read anew from the beginning."""
    lines = [text + more[:count] for count in range(len(more) + 1)]
    return [reader.begin([line])[2][0][-1] for line in lines]


@pytest.mark.parametrize("name", TOGETHER)
def test_texts_come_and_go(name: str) -> None:
    """Three are read together, one leaves, another comes, all grow: as if each were alone."""
    model = tiny(name)
    hooks = num_hooks(model)
    reader = Reader(model, "att")
    assert reader.together
    first, second, third, late = texts(5, 9, 2, 13)
    more = random_tokens(3, seed=3).tolist()
    wanted = {n: alone(reader, t, more) for n, t in (("2", second), ("3", third), ("4", late))}
    rows, states, logits = reader.begin([first, second, third])
    assert [tuple(s.shape) for s in states] == [(1, 32)] * 3
    seen = {"2": [logits[1][-1]], "3": [logits[2][-1]], "4": []}
    rows.keep([1, 2])
    lines = {"2": [*second, more[0]], "3": [*third, more[0]]}
    logits = reader.step(rows, list(lines.values()))[1]
    other, _, fresh = reader.begin([late])
    rows.join(other)
    rows.keep([1, 0, 2])  # in whatever order
    for name_, line in zip(("2", "3", "4"), [*logits, *fresh], strict=True):
        seen[name_].append(line[-1])
    lines = {"3": [*third, *more[:2]], "2": [*second, *more[:2]], "4": [*late, more[0]]}
    for name_, line in zip(lines, reader.step(rows, list(lines.values()))[1], strict=True):
        seen[name_].append(line[-1])
    for name_, lines_ in seen.items():
        for mine, right in zip(lines_, wanted[name_], strict=False):
            assert torch.allclose(mine, right, rtol=1e-4, atol=1e-4), name_
    assert num_hooks(model) == hooks


def test_columns_of_padding_go_when_nobody_needs_them() -> None:
    reader = Reader(tiny("llama"), "att")
    rows = reader.begin(texts(4, 20))[0]
    assert rows.width == 20
    rows.keep([0])
    assert (rows.width, rows.lengths) == (4, [4])
    assert {tuple(layer.keys.shape[::2]) for layer in rows.cache.layers} == {(1, 4)}


def test_the_whole_of_a_text_is_read_where_it_is_asked_for() -> None:
    reader = Reader(tiny("gpt2"), "att")
    short, long = texts(4, 7)
    _, states, logits = reader.begin([short, long], whole=True)
    assert [len(s) for s in states] == [len(p) for p in logits] == [4, 7]
    with torch.no_grad():
        right = reader.model(torch.tensor([short])).logits[0]
    assert torch.allclose(logits[0], right, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "gpt2"])
def test_a_model_that_cannot_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mask the padding is read as text, which a trial tells."""
    model = tiny(name)
    if name == "gpt2":
        forward = model.forward

        def blind(
            input_ids: Any = None,
            attention_mask: Any = None,
            past_key_values: Any = None,
            use_cache: Any = None,
        ) -> Any:
            return forward(
                input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache
            )

        monkeypatch.setattr(model, "forward", blind)
    reader = Reader(model, "att" if name == "gpt2" else "ffn")
    assert not reader.together
    (text,), more = texts(6), random_tokens(2).tolist()
    rows, _, logits = reader.begin([text])
    found = [logits[0][-1]]
    for count in (1, 2):
        found.append(reader.step(rows, [text + more[:count]])[1][0][-1])
    for mine, right in zip(found, alone(reader, text, more), strict=True):
        assert torch.allclose(mine, right, atol=1e-4)


def test_a_window_that_slides_hides_what_it_has_passed() -> None:
    """Its columns are kept, and the mask alone hides them, also for rows of unequal length."""
    from tests.lm.tiny_models import transformers

    config = tiny("mistral").config.to_dict() | {"sliding_window": 4}
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).eval()
    reader = Reader(model, "att")
    assert reader.together
    short, long = texts(3, 11)
    rows = reader.begin([short, long])[0]
    for count in (1, 2, 3):
        logits = reader.step(rows, [short + [5] * count, long + [5] * count])[1]
    for text, line in zip((short, long), logits, strict=True):
        with torch.no_grad():
            right = model(torch.tensor([text + [5] * 3])).logits[0, -1]
        assert torch.allclose(line[-1], right, atol=1e-4)


def test_rows_of_a_model_without_a_cache_hold_nothing() -> None:
    rows = Rows(lengths=[0])
    rows.keep([0])
    assert rows.width == 0 and rows.cache is None
