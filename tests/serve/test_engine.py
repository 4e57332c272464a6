"""Many texts at once: each gets what it would get alone, and nothing of another's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from knnext.serve.engine import Engine
from tests.explore.small import CONTEXT, LMBDA, TEMPERATURE, TEXT, K
from tests.lm.test_knnlm import index_of
from tests.lm.tiny_models import random_tokens, tiny
from tests.serve.asking import PROMPTS, ask

ALL = [*PROMPTS, ""]


# What is written


def generated(mixed: Any, ids: list[int], count: int) -> list[int]:
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    out = mixed.generate(given, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_texts_are_those_of_generate(engine: Any, mixed: Any) -> None:
    asking = ask(engine, prompt=ALL, max_tokens=8)
    right = [generated(mixed, text.prompt.ids, 8) for text in asking.job.texts]
    assert asking.ids() == right


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_company_changes_nothing(make_engine: Any, size: int) -> None:
    """By argmax and drawn, of one request and of several, however many fit in at once."""
    engine = make_engine(max_batch=size)
    bodies: list[dict[str, Any]] = [
        {"prompt": ALL, "max_tokens": 6},
        {"prompt": TEXT[:40], "max_tokens": 9, "temperature": 1, "seed": 5, "n": 3},
        {"prompt": PROMPTS[1], "max_tokens": 3, "temperature": 1.5, "top_p": 0.9, "seed": -1},
        {"prompt": PROMPTS[:2], "echo": True, "logprobs": 3, "max_tokens": 2},
    ]
    together = [ask(engine, **body) for body in bodies]
    got = [asking.ids() for asking in together]
    alone = [ask(engine, **body).ids() for body in bodies]
    assert got == alone
    first = ask(engine, **{**bodies[1], "n": 1}).ids()
    assert first == alone[1][:1] and len({tuple(ids) for ids in alone[1]}) == 3
    second = ask(engine, **{**bodies[0], "prompt": PROMPTS[3]}).ids()
    assert second == alone[0][3:4]


@pytest.mark.parametrize(("name", "together"), [("llama", True), ("mamba", False)])
def test_other_models(opened: Any, name: str, together: bool) -> None:
    """One that reads texts side by side, and one that must read each alone: one search for all."""
    from knnext.lm.knnlm import KNNLM

    layer = "att" if together else "ffn"
    index = index_of(tiny(name), random_tokens(60), key_layer=layer)
    mixed = KNNLM(tiny(name), index, 4, 1.0, 0.5)
    engine = Engine(mixed, opened.tokenizer)
    try:
        assert engine.reader.together == together
        index.searched.clear()
        prompts = [random_tokens(length, seed=length).tolist() for length in (3, 9, 5)]
        got = ask(engine, prompt=prompts, max_tokens=5).ids()
        assert index.searched[0] == 3 and len(index.searched) <= 5
        for ids, prompt in zip(got, prompts, strict=True):
            right = generated(mixed, prompt, 5)
            assert ids == right[: len(ids)] and (len(ids) == 5 or ids[-1] == 2)
    finally:
        engine.cancel()


def test_one_search_a_step(make_engine: Any, gated: Any) -> None:
    engine = make_engine(mixed=gated)
    gate = gated.index
    gate.hold()
    first = ask(engine, prompt="the", max_tokens=6)
    gate.held()
    others = [ask(engine, prompt=ALL, max_tokens=4), ask(engine, prompt="fox", n=2)]
    before = engine.steps
    gate.open.set()
    for asking in (first, *others):
        asking.pieces()
    assert gate.sizes[:2] == [1, 9]  # the first alone, then with all that came meanwhile
    assert len(gate.sizes) == engine.mixer.searches == engine.steps - before + 1
    assert engine.tokens_written == 6 + 6 * 4 + 2 * 16


def test_texts_that_end_make_room(make_engine: Any, gated: Any) -> None:
    engine = make_engine(mixed=gated, max_batch=2)
    lengths = [1, 5, 2, 1, 3]
    askings = [ask(engine, prompt="fox", max_tokens=count) for count in lengths]
    assert [len(asking.ids()[0]) for asking in askings] == lengths
    assert max(gated.index.sizes) <= 2


def test_long_prompts_are_read_in_turns(make_engine: Any, gated: Any) -> None:
    """More tokens than one pass may have, padding included, take several."""
    engine = make_engine(mixed=gated)
    engine._budget = 20
    gated.index.hold()
    first = ask(engine, prompt="fox", max_tokens=1)
    gated.index.held()
    asking = ask(engine, prompt=[[5] * 12, [6] * 3, [7] * 4, [8] * 2, [9] * 25], max_tokens=2)
    gated.index.open.set()
    first.pieces()
    assert [len(ids) for ids in asking.ids()] == [2] * 5
    # 12 + 3 + 4 tokens, in a pass of 3 and 4 and one of 12; then 2; then 25, alone.
    assert gated.index.sizes[1:] == [3, 4, 2, 1]


def test_mixtures_of_their_own(engine: Any, opened: Any, mixed: Any) -> None:
    """One batch: the base LM alone, the neighbors alone, fewer neighbors, the server's own."""
    from knnext.lm.knnlm import KNNLM

    wanted = {
        "own": {},
        "base": {"lmbda": 0},
        "neighbors": {"lmbda": 1, "temperature": 0.5},
        "few": {"k": 2, "lmbda": 0.9},
    }
    askings = {
        name: ask(engine, prompt=PROMPTS[1], max_tokens=5, knn=knn) for name, knn in wanted.items()
    }
    for name, knn in wanted.items():
        given = {"k": K, "temperature": TEMPERATURE, "lmbda": LMBDA, **knn}
        own = KNNLM(opened.model, opened.index, given["k"], given["temperature"], given["lmbda"])
        text = askings[name].job.texts[0]
        assert askings[name].ids() == [generated(own, text.prompt.ids, 5)], name


# What is told of tokens


def test_log_p_of_a_prompt(engine: Any, mixed: Any, opened: Any) -> None:
    """Of each token by the mixture, its neighbors' share, and the likeliest."""
    ids = opened.tokenizer(TEXT, add_special_tokens=False)["input_ids"][: CONTEXT - 1]
    body = {"prompt": [ids, ids[:5]], "echo": True, "logprobs": 3, "max_tokens": 0}
    long, short = ask(engine, **body).pieces()
    tokens = [token for piece in long for token in piece.tokens]
    with torch.no_grad():
        log_p = mixed(input_ids=torch.tensor([ids])).logits[0]
        log_p_lm = opened.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert [token.token for token in tokens] == ids
    assert tokens[0].log_p is None and tokens[0].share is None and tokens[0].top == ()
    for place, token in enumerate(tokens[1:], 1):
        right = float(log_p[place - 1, ids[place]])
        assert token.log_p == pytest.approx(right, abs=1e-4)
        base = (1 - LMBDA) * float(log_p_lm[place - 1, ids[place]].exp())
        assert token.share == pytest.approx(1 - base / float(torch.tensor(right).exp()), abs=1e-3)
        best = log_p[place - 1].topk(3)
        assert [p for _, _, p in token.top][:3] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert ids[place] in [number for number, _, _ in token.top] and len(token.top) <= 4
    cut = [token for piece in short for token in piece.tokens]
    assert [token.log_p for token in cut][1:] == pytest.approx(
        [token.log_p for token in tokens[1:5]], abs=1e-4
    )
    assert [piece.finish for piece in long][-1] == "length" and long[-1].num_new == 0


def test_offsets_lead_to_the_tokens(engine: Any) -> None:
    text = "a lazy 🦊 dog é"
    (pieces,) = ask(engine, prompt=text, echo=True, logprobs=0, max_tokens=6).pieces()
    whole = "".join(piece.text for piece in pieces)
    tokens = [token for piece in pieces for token in piece.tokens]
    assert whole.startswith(text) and len(tokens) == len(pieces[0].tokens) + 6
    assert [token.offset for token in tokens] == sorted(token.offset for token in tokens)
    for token in tokens:
        if not token.name.startswith("<"):
            assert whole[token.offset :].startswith(token.name)
    assert all(len(token.top) == 1 for token in tokens[1:])


def test_what_is_chosen_has_the_log_p_that_is_told(engine: Any) -> None:
    """Read back as a prompt, an answer has the same log p."""
    asking = ask(engine, prompt="the quick", max_tokens=6, logprobs=1, temperature=1, seed=3)
    (pieces,) = asking.pieces()
    ids = asking.job.texts[0].ids
    (again,) = ask(engine, prompt=[ids], max_tokens=0, logprobs=1, echo=True).pieces()
    new = [token for piece in pieces for token in piece.tokens]
    read = [token for piece in again for token in piece.tokens][-6:]
    assert [one.log_p for one in new] == pytest.approx([one.log_p for one in read], abs=1e-4)
    assert [one.share for one in new] == pytest.approx([one.share for one in read], abs=1e-3)


# Where texts end


def test_stop_strings(engine: Any) -> None:
    (text,) = ask(engine, prompt="the quick", max_tokens=12).texts()
    stop = text[4:7]
    asking = ask(engine, prompt="the quick", max_tokens=12, stop=["never", stop], logprobs=0)
    (pieces,) = asking.pieces()
    out = "".join(piece.text for piece in pieces)
    assert out == text[: text.index(stop)] and pieces[-1].finish == "stop"
    tokens = [token for piece in pieces for token in piece.tokens]
    assert all(token.offset < len(out) for token in tokens)
    assert pieces[-1].num_new == len(asking.job.texts[0].ids) - len(asking.job.texts[0].prompt.ids)


def test_the_end_of_a_text(make_engine: Any, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that ends texts is told, and adds nothing to the text."""
    monkeypatch.setattr(opened.model.generation_config, "eos_token_id", None)
    (ids,) = ask(make_engine(), prompt="fox", max_tokens=6).ids()
    ends = [299, ids[3]]
    monkeypatch.setattr(opened.model.generation_config, "eos_token_id", ends)
    asking = ask(make_engine(), prompt="fox", max_tokens=6, logprobs=0)
    (pieces,) = asking.pieces()
    place = next(i for i, token in enumerate(ids) if token in ends)
    assert pieces[-1].finish == "stop" and pieces[-1].num_new == place + 1
    assert [token.token for piece in pieces for token in piece.tokens] == ids[: place + 1]
