"""The stream of states: every position once, the right pairs, the stated context, the same bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from knnext.lm.hidden_states import (
    HiddenStatesBatch,
    batch_ends,
    default_block_size,
    hidden_states,
)
from tests.lm.tiny_models import num_hooks, random_tokens, tiny

WINDOWS = {"block_size": 32, "stride": 20, "dtype": torch.float32}


def joined(batches: Any, name: str) -> Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


def whole_pass(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(input of the output layer, log p) of one window, without any of the code under test."""
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits
        states = model.base_model(input_ids=tokens[None]).last_hidden_state
    return states[0], logits[0].float().log_softmax(-1)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(0, 90),
    block=st.integers(1, 40),
    stride=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    start=st.integers(0, 90),
)
def test_each_position_once_with_its_next_token(
    length: int, block: int, stride: int, batch_size: int, start: int
) -> None:
    tokens, stride, start = (
        random_tokens(length),
        min(stride, block),
        min(start, max(0, length - 1)),
    )
    batches = list(
        hidden_states(
            tiny("gpt2"),
            tokens,
            block_size=block,
            stride=stride,
            batch_size=batch_size,
            start=start,
        )
    )
    rows = list(range(start, max(0, length - 1)))
    positions = [int(p) for batch in batches for p in batch.positions]
    assert positions == rows
    assert [int(t) for batch in batches for t in batch.targets] == tokens[1:][start:].tolist()
    assert all(len(b.keys) == len(b) > 0 and b.keys.dtype == torch.float16 for b in batches)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "mistral", "gpt_neox", "opt", "gemma2", "cohere"]
)
def test_states_and_log_p_are_those_of_each_window_alone(name: str) -> None:
    """Also for models whose logits are more than their output layer (opt, gemma2, cohere)."""
    model, tokens = tiny(name), random_tokens(75)
    options: dict[str, Any] = {**WINDOWS, "key_layer": "ffn", "batch_size": 2}
    batches = list(hidden_states(model, tokens, with_log_p_lm=True, **options))
    keys, log_p = joined(batches, "keys"), joined(batches, "log_p_lm")
    # windows begin at 0, 20, 40, 60 and give 0-31, 32-51, 52-71, 72-73
    for begin, first, end in ((0, 0, 32), (20, 32, 52), (40, 52, 72), (60, 72, 74)):
        states, expected = whole_pass(model, tokens[begin : min(begin + 32, 74)])
        rows = torch.arange(first, end)
        torch.testing.assert_close(keys[rows], states[rows - begin], atol=1e-5, rtol=1e-5)
        wanted = expected[rows - begin, tokens[rows + 1]]
        torch.testing.assert_close(log_p[rows], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("layer", ["att", "ffn"])
def test_batch_size_and_what_else_is_asked_change_nothing(name: str, layer: str) -> None:
    model, tokens = tiny(name), random_tokens(150)
    keys = [
        joined(hidden_states(model, tokens, key_layer=layer, **WINDOWS, **more), "keys")
        for more in (
            {"batch_size": 1},
            {"batch_size": 3},
            {"batch_size": 8, "with_log_p_lm": True},
            {"batch_size": 8, "with_logits": True},
        )
    ]
    for other in keys[1:]:
        torch.testing.assert_close(other, keys[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", [1, 31, 32, 33, 70, 111, 112, 113, 148, 149])
def test_a_resumed_stream_has_the_same_bits(start: int) -> None:
    model, tokens = tiny("gpt2"), random_tokens(150)
    options: dict[str, Any] = {**WINDOWS, "batch_size": 2, "with_log_p_lm": True}
    whole = list(hidden_states(model, tokens, **options))
    rest = list(hidden_states(model, tokens, start=start, **options))
    for name in ("positions", "keys", "targets", "log_p_lm"):
        expected = joined(whole, name)[start:]
        assert torch.equal(joined(rest, name) if rest else expected[:0], expected)


@pytest.mark.parametrize(
    ("length", "block", "stride", "batch"),
    [(100, 16, 8, 3), (100, 16, 16, 2), (97, 16, 5, 1), (10, 16, 8, 2), (40, 7, 3, 9)],
)
def test_runs_between_batch_ends_share_a_stream(
    length: int, block: int, stride: int, batch: int
) -> None:
    """They do the passes of one run, no more, and give its bits; whatever the cut, all rows."""
    model, tokens = tiny("gpt2"), random_tokens(length)
    options: dict[str, Any] = {"block_size": block, "stride": stride, "batch_size": batch}
    whole = list(hidden_states(model, tokens, **options))
    ends = batch_ends(length, block, stride, batch).tolist()
    assert not len(batch_ends(1, block, stride, batch))
    assert ends == [int(one.positions[-1]) + 1 for one in whole]
    for cut in (ends[::2], [4, length // 3, length // 2]):  # at batches, and anywhere
        bounds = sorted({0, length - 1, *cut})
        parts = [
            one
            for a, b in itertools.pairwise(bounds)
            for one in hidden_states(model, tokens, start=a, stop=b, **options)
        ]
        assert cut != ends[::2] or len(parts) == len(whole)
        for name in ("positions", "keys", "targets"):
            assert torch.equal(joined(parts, name), joined(whole, name))


@pytest.mark.parametrize("more", [{}, {"start": 37, "stop": 111}, {"start": 149}])
@pytest.mark.parametrize("documents", [False, [0, 40, 90, 150]])
def test_a_batch_ahead_changes_nothing(
    more: dict[str, int], documents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the next batch is begun before the last one is given."""
    options: dict[str, Any] = {**WINDOWS, "batch_size": 1, "separate_documents": documents, **more}
    usual = list(hidden_states(tiny("gpt2"), random_tokens(150), **options))
    monkeypatch.setattr("knnext.lm.hidden_states._AHEAD", {"cpu"})
    ahead = list(hidden_states(tiny("gpt2"), random_tokens(150), **options))
    assert [len(batch) for batch in ahead] == [len(batch) for batch in usual]
    for one, other in zip(ahead, usual, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.positions, other.positions)


def test_logits_and_log_p_agree() -> None:
    tokens = random_tokens(50)
    for batch in hidden_states(tiny("llama"), tokens, with_log_p_lm=True, with_logits=True):
        assert batch.lm_logits is not None and batch.log_p_lm is not None
        expected = batch.lm_logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        torch.testing.assert_close(batch.log_p_lm, expected, atol=1e-5, rtol=1e-5)


def test_log_p_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny("llama"), random_tokens(100)
    whole = joined(hidden_states(model, tokens, with_log_p_lm=True), "log_p_lm")
    monkeypatch.setattr("knnext.lm.forward._LOGITS_BYTES", 7 * 97 * 4)
    stream = hidden_states(model, tokens, with_log_p_lm=True)  # its probes are done here
    sizes: list[int] = []
    handle = model.lm_head.register_forward_hook(
        lambda m, args, output: sizes.append(output[..., 0].numel())
    )
    pieces = joined(stream, "log_p_lm")
    handle.remove()
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-6)
    assert max(sizes) == 7
    assert sum(sizes) == 99  # each row once


def test_keys_alone_cost_no_output_layer() -> None:
    model, tokens = tiny("llama"), random_tokens(100)
    stream = hidden_states(model, tokens)
    calls: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    list(stream)
    handle.remove()
    assert calls == []


def test_nothing_stays_on_the_model() -> None:
    model = tiny("gpt2")
    model.transformer.h[1].train()  # a mixed state must come back too
    try:
        stream = hidden_states(model, random_tokens(100), batch_size=1, block_size=16)
        next(stream)
        assert num_hooks(model) == 0  # between batches
        assert model.transformer.h[1].training and not model.training
        stream.close()
        handle = model.transformer.h[0].register_forward_pre_hook(_raise)
        with pytest.raises(ArithmeticError):
            list(hidden_states(model, random_tokens(100), key_layer="module:lm_head:input"))
        handle.remove()
        assert num_hooks(model) == 0
        assert model.transformer.h[1].training
    finally:
        model.eval()


def _raise(*_: Any) -> None:
    raise ArithmeticError


def test_dropout_is_off_in_a_training_model() -> None:
    model, tokens = tiny("gpt2"), random_tokens(40)
    expected = joined(hidden_states(model, tokens), "keys")
    model.train()
    try:
        assert torch.equal(joined(hidden_states(model, tokens), "keys"), expected)
    finally:
        model.eval()


def test_keys_too_large_for_half() -> None:
    model = tiny("llama")
    weight = model.model.layers[-1].post_attention_layernorm.weight
    saved = weight.detach().clone()
    try:
        weight.data.fill_(1e6)
        with pytest.raises(
            ValueError, match=r"do not fit torch.float16.*bfloat16 or torch.float32"
        ):
            list(hidden_states(model, random_tokens(20)))
        batches = list(hidden_states(model, random_tokens(20), dtype=torch.bfloat16))
        assert joined(batches, "keys").isfinite().all()
    finally:
        weight.data.copy_(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"block_size": 8, "stride": 9}, "stride must be from 1 to block_size=8, got 9"),
        ({"stride": 0}, "stride must be"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"start": 20}, "start must be from 0 to 19, got 20"),
        ({"start": -1}, "start must be"),
        ({"stop": 20}, "stop must be from start=0 to 19, got 20"),
        ({"start": 5, "stop": 4}, "stop must be from start=5 to 19, got 4"),
        ({"key_layer": "mlp"}, "key_layer must be"),
    ],
)
def test_bad_arguments_raise_at_the_call(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hidden_states(tiny("gpt2"), random_tokens(20), **options)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([1, 2, 97]), r"\[0, 97\).*got 1 to 97"),
        ([-1, 3], r"got -1 to 3"),
        ([[1, 2]], "one-dimensional integers"),
        ([0.5, 1.0], "one-dimensional integers"),
    ],
)
def test_bad_tokens(tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hidden_states(tiny("gpt2"), tokens)


def test_default_block_size_is_the_models() -> None:
    assert default_block_size(tiny("gpt2")) == 64
    assert default_block_size(torch.nn.Linear(1, 1)) == 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    import copy

    model = copy.deepcopy(tiny("llama")).to(dtype)
    exact = joined(hidden_states(tiny("llama"), random_tokens(60), **WINDOWS), "keys")
    batches: list[HiddenStatesBatch] = list(
        hidden_states(model, random_tokens(60), with_log_p_lm=True, **WINDOWS)
    )
    assert joined(batches, "log_p_lm").dtype == torch.float32
    torch.testing.assert_close(joined(batches, "keys"), exact, atol=0.15, rtol=0.05)
