"""Documents read one by one: states and log p are those of each document alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from knnext.corpus import TokenizedDocuments
from knnext.lm.batching import choose_batch_size, length_matters, token_bytes
from knnext.lm.hidden_states import batch_ends, hidden_states
from knnext.lm.key_layer import find_key_module
from knnext.lm.running import trace_inputs
from tests.lm.every_model import NAMES, NOT_BUILT, every
from tests.lm.tiny_models import CONFIGS, random_tokens, tiny

LENGTHS = (7, 1, 40, 23, 3, 64, 0, 31, 12)
OFFSETS = np.cumsum([0, *LENGTHS])
OPTIONS: dict[str, Any] = {"dtype": torch.float32, "key_layer": "ffn", "batch_size": 2}


def text(tokens: Tensor) -> TokenizedDocuments:
    counts = np.zeros(len(LENGTHS), np.int64)
    names = [f"d{i}" for i in range(len(LENGTHS))]
    return TokenizedDocuments(tokens.numpy().astype(np.int32), OFFSETS, names, counts, counts)


def joined(batches: Any, name: str = "keys") -> Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


def alone(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(what the output layer reads, log p of every token) of one row, by the model itself."""
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    extra = {"use_cache": False} if "use_cache" in trace_inputs(model) else {}
    with torch.no_grad():
        logits = model(input_ids=tokens[None], **extra).logits
    handle.remove()
    return seen[-1].reshape(len(tokens), -1), logits[0].float().log_softmax(-1)


def check_against_single_runs(model: Any, block: int) -> None:
    """Documents are no longer than a window, but for some that are when it is short."""
    tokens = random_tokens(int(OFFSETS[-1]))
    batches = list(
        hidden_states(
            model,
            text(tokens),
            block_size=block,
            stride=block // 2,
            with_log_p_lm=True,
            separate_documents=True,
            **OPTIONS,
        )
    )
    keys, log_p = joined(batches), joined(batches, "log_p_lm")
    assert joined(batches, "positions").tolist() == list(range(len(tokens) - 1))
    assert torch.equal(joined(batches, "targets"), tokens[1:])
    for first, last in zip(OFFSETS[:-1], np.minimum(OFFSETS[1:], len(tokens) - 1), strict=True):
        for begin in range(first, last, block // 2):
            end = min(begin + block, last)
            states, expected = alone(model, tokens[begin:end])
            rows = torch.arange(begin if begin == first else begin + block - block // 2, end)
            torch.testing.assert_close(keys[rows], states[rows - begin], atol=2e-5, rtol=2e-5)
            wanted = expected[rows - begin, tokens[rows + 1]]
            torch.testing.assert_close(log_p[rows], wanted, atol=2e-5, rtol=2e-5)
            if end == last:
                break


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("block", [64, 16])
def test_states_are_those_of_each_document_alone(name: str, block: int) -> None:
    """Learned, rotary and no positions, ALiBi, sliding windows, a state space."""
    check_against_single_runs(tiny(name), block)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(8))
def test_so_are_those_of_every_family(part: int) -> None:
    failed = []
    for name in NAMES[part::8]:
        if name in NOT_BUILT or name == "reformer":  # whose hashes are drawn anew in every pass
            continue
        model = every(name)
        try:
            find_key_module(model, "ffn")
        except ValueError:  # it sees the future, or has no output layer
            continue
        try:
            check_against_single_runs(model, 32)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {str(error).strip()[:300]}")
    assert not failed, "\n".join(failed)


def longrope(original: int) -> Any:
    import transformers

    torch.manual_seed(0)
    half = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "rope_type": "longrope"}
    config = transformers.Phi3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        original_max_position_embeddings=original,
        rope_parameters={
            "rope_theta": 10000.0,
            "original_max_position_embeddings": original,
            "factor": 128 / original,
            **half,
        },
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.Phi3ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # attention that looks at something
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def test_rows_are_not_filled_up_where_their_length_turns_the_positions() -> None:
    model = longrope(16)
    assert length_matters(model, 64) and not length_matters(model, 16)
    check_against_single_runs(model, 64)
    assert not any(length_matters(tiny(name), 64) for name in CONFIGS)


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_nor_where_attention_picks_tokens_out_of_a_row(name: str) -> None:
    model = every(name)
    assert length_matters(model, 32) and not length_matters(model, 8)
    check_against_single_runs(model, 32)


def test_a_resumed_stream_has_the_same_bits() -> None:
    tokens = random_tokens(int(OFFSETS[-1]))
    options = {**OPTIONS, "block_size": 16, "batch_size": 1, "separate_documents": OFFSETS}
    whole = joined(hidden_states(tiny("gpt2"), tokens, **options))
    for start in (1, 7, 60, len(whole) - 1, len(whole)):
        rest = list(hidden_states(tiny("gpt2"), tokens, start=start, **options))
        assert torch.equal(joined(rest) if rest else whole[:0], whole[start:])
    ends = batch_ends(len(tokens), 16, 8, 1, OFFSETS)
    assert len(ends) > 2 and ends[-1] == len(whole)
    parts = [
        joined(hidden_states(tiny("gpt2"), tokens, start=a, stop=b, **options))
        for a, b in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_logits_come_too() -> None:
    tokens = random_tokens(int(OFFSETS[-1]))
    options = {**OPTIONS, "separate_documents": OFFSETS, "with_log_p_lm": True}
    batches = list(hidden_states(tiny("llama"), tokens, with_logits=True, **options))
    expected = joined(batches, "lm_logits").log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(joined(batches, "log_p_lm"), expected, atol=1e-5, rtol=1e-5)


def test_bos_stands_before_the_later_windows_of_a_document() -> None:
    tokens = random_tokens(int(OFFSETS[-1]))
    options = {**OPTIONS, "block_size": 16, "stride": 8, "separate_documents": OFFSETS}
    keys = joined(hidden_states(tiny("gpt2"), tokens, bos=1, **options))
    first = int(OFFSETS[2])
    assert torch.equal(keys[first : first + 16], alone_keys(tokens[first : first + 16]))
    window = tokens[first + 8 : first + 24].clone()
    window[0] = 1
    torch.testing.assert_close(keys[first + 16 : first + 24], alone_keys(window)[8:])
    with pytest.raises(ValueError, match="stride must be below block_size=16"):
        hidden_states(tiny("gpt2"), tokens, bos=1, **{**options, "stride": 16})
    short = {**options, "block_size": 64, "stride": 64}  # no document has a second window
    assert len(joined(hidden_states(tiny("gpt2"), tokens, bos=1, **short))) == len(keys)


def alone_keys(tokens: Tensor) -> Tensor:
    return alone(tiny("gpt2"), tokens)[0]


def test_the_last_window_can_be_a_full_one() -> None:
    tokens = random_tokens(int(OFFSETS[-1]))
    options = {**OPTIONS, "block_size": 16, "stride": 16, "separate_documents": OFFSETS}
    keys = joined(hidden_states(tiny("gpt2"), tokens, full_last_window=True, **options))
    first, last = int(OFFSETS[2]), int(OFFSETS[3])  # 16, 16 and 7 tokens, and the next one's mark
    own = alone_keys(tokens[last - 17 : last - 1])[9:]
    torch.testing.assert_close(keys[last - 8 : last - 1], own)
    torch.testing.assert_close(keys[last - 1], alone_keys(tokens[last - 16 : last])[-1])
    assert torch.equal(keys[first : first + 16], alone_keys(tokens[first : first + 16]))


@pytest.mark.parametrize(
    ("tokens", "separate", "message"),
    [
        (random_tokens(9), True, "wants TokenizedDocuments"),
        (random_tokens(9), [0, 5], "places where documents begin"),
        (random_tokens(9), [0, 6, 5, 9], "places where documents begin"),
    ],
)
def test_bad_documents(tokens: Tensor, separate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hidden_states(tiny("gpt2"), tokens, separate_documents=separate)


def test_batches_are_sized_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr("knnext.lm.batching.free_memory", lambda _: None)
    assert choose_batch_size(model, 64) == 128 and choose_batch_size(model, 8192) == 1
    for free in (1 << 20, 8 << 20, 64 << 20):
        monkeypatch.setattr("knnext.lm.batching.free_memory", lambda _, free=free: free)
        chosen = choose_batch_size(model, 64)
        assert chosen * 64 * token_bytes(model, 64) <= free / 4
        assert 1 <= chosen < 128
    with_logits = token_bytes(model, 64, logits=True) - token_bytes(model, 64)
    assert with_logits == 97 * 8  # of each word, as the model gives it and in float32
    monkeypatch.setattr("knnext.lm.batching.free_memory", lambda _: 0)
    assert choose_batch_size(model, 64) == 1
