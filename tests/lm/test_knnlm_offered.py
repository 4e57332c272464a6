"""What a KNNLM offers of its base model, and what it refuses; and searching some positions only."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from knnext import KNNLM, KNNLogitsProcessor
from tests.lm.test_knnlm import index_of
from tests.lm.tiny_models import VOCAB, tiny, transformers
from tests.lm.ways import FAMILIES, OPTIONS, PLAIN, PROMPTS, TEXT


@pytest.fixture(scope="module")
def lm() -> KNNLM:
    model = tiny("gpt2")
    return KNNLM(model, index_of(model, TEXT), **OPTIONS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("save_pretrained", "save the base model"),
        ("push_to_hub", "save the base model"),
        ("generate_batch", "continuous batching.*call generate with a batch"),
        ("resize_token_embeddings", "before the datastore is built"),
        ("prepare_inputs_for_generation", r"no neighbors.*lm\.attached\(\)"),
        ("num_parameters", r"lm\.model"),
        ("no_such_thing", "no attribute 'no_such_thing'$"),
    ],
)
def test_what_is_not_offered(lm: KNNLM, name: str, message: str) -> None:
    with pytest.raises(AttributeError, match=message):
        getattr(lm, name)
    assert not hasattr(lm, name)


def test_continuous_batching_is_refused_while_attached(lm: KNNLM) -> None:
    """It runs in a thread of its own, where the base model would answer for the mixture."""
    config = transformers.GenerationConfig(**PLAIN)
    with lm.attached() as model:
        with lm.attached():
            pass
        with pytest.raises(RuntimeError, match="attached to this model: continuous batching"):
            model.generate_batch([[1, 2, 3]], generation_config=config)
        with pytest.raises(RuntimeError, match="continuous batching"):
            model.init_continuous_batching(config)
    assert "init_continuous_batching" not in vars(lm.model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))])
def test_a_copy_of_an_attached_model_refuses_nothing(copied: Any) -> None:
    model = tiny("gpt2")
    lm = KNNLM(model, index_of(model, TEXT), **OPTIONS)
    with lm.attached():
        other = copied(lm)
    method = other.model.init_continuous_batching
    assert (
        method.__self__ is other.model and method.__func__ is type(model).init_continuous_batching
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_is_asked_for_is_searched(name: str) -> None:
    model = tiny(name)
    lm = KNNLM(model, index_of(model, TEXT), **OPTIONS)
    wanted = torch.zeros(3, 8, dtype=torch.bool)
    wanted[0, 5:], wanted[2, 3] = True, True
    with torch.no_grad():
        whole, base = lm(PROMPTS).logits, model(PROMPTS).logits.float().log_softmax(-1)
        lm.index.searched.clear()
        found = lm(PROMPTS, searched=wanted).logits
    assert lm.index.searched == [4]
    torch.testing.assert_close(found[wanted], whole[wanted])
    assert torch.equal(found[~wanted], base[~wanted])
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[0, :6] = 0
    with torch.no_grad():
        lm(PROMPTS, attention_mask=mask, searched=wanted)
    assert lm.index.searched == [4, 3]
    for bad in (wanted[:2], wanted.long()):
        with pytest.raises(ValueError, match=r"searched must be a bool .* shape \(3, 8\)"):
            lm(PROMPTS, searched=bad)


def test_searched_with_logits_to_keep() -> None:
    model = tiny("llama")
    lm = KNNLM(model, index_of(model, TEXT), **OPTIONS)
    wanted = torch.arange(8).expand(3, 8) % 2 == 1
    with torch.no_grad():
        whole = lm(PROMPTS, searched=wanted).logits
        for keep in (3, torch.tensor([1, 4])):
            part = lm(PROMPTS, searched=wanted, logits_to_keep=keep).logits
            rows = slice(-keep, None) if isinstance(keep, int) else keep
            torch.testing.assert_close(part, whole[:, rows])
    assert part.shape[-1] == VOCAB


def test_a_custom_generate_is_given_all_positions(lm: KNNLM) -> None:
    """What it reads of them is not known."""

    def decode(model: Any, input_ids: Any, **_: Any) -> Any:
        return model(input_ids=input_ids).logits

    with torch.no_grad():
        assert torch.equal(
            lm.generate(PROMPTS, custom_generate=decode, **PLAIN), lm(PROMPTS).logits
        )


IMAGE = 90


@pytest.mark.parametrize("way", [KNNLM, KNNLogitsProcessor])
@torch.no_grad()
def test_a_model_of_images_and_text(way: Any) -> None:
    """The keys are its text's; an image among the tokens is read as the model reads it."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config={**small, "vocab_size": VOCAB, "model_type": "llama"},
        vision_config={**small, "image_size": 8, "patch_size": 4, "projection_dim": 16},
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    text = TEXT.masked_fill(TEXT == IMAGE, 5)
    given = {"pixel_values": torch.randn(1, 3, 8, 8)}
    ids = torch.cat([text[:3], torch.full((4,), IMAGE), text[3:9]])[None]
    index = index_of(model, text)
    wanted = ids
    for _ in range(4):  # in float64, of all tokens so far
        read: list[torch.Tensor] = []
        block = model.model.language_model.layers[-1].mlp
        handle = block.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        p_lm = model(wanted, **given).logits[0, -1].double().softmax(-1)
        handle.remove()
        squares = (index.keys.double() - read[0][0, -1].double()).square().sum(-1)
        near, rows = squares.topk(4, largest=False)
        weights = (-near / OPTIONS["temperature"]).softmax(-1)
        p_knn = torch.zeros_like(p_lm).scatter_add_(0, index.values[rows], weights)
        mixed = (1 - OPTIONS["lmbda"]) * p_lm + OPTIONS["lmbda"] * p_knn
        wanted = torch.cat([wanted, mixed.argmax()[None, None]], 1)
    options = {**given, **PLAIN, "max_new_tokens": 4}
    made = way(model, index, **OPTIONS)
    if way is KNNLM:
        found = made.generate(ids, **options)
    else:
        with made:
            found = model.generate(ids, logits_processor=[made], **options)
    assert torch.equal(found, wanted)
    assert not torch.equal(model.generate(ids, **options), wanted)


def test_it_is_made_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """Of GPT-2, for one, transformers says at its first loss which one it takes."""
    from transformers.utils import logging

    logging.enable_propagation()
    once = type(transformers.modeling_utils.logger).warning_once
    once.cache_clear()
    before, level = logging.get_verbosity(), logging.WARNING
    logging.set_verbosity(level)
    try:
        model = tiny("gpt2")
        KNNLM(model, index_of(model, TEXT), **OPTIONS)
        assert not caplog.records and logging.get_verbosity() == level
        once.cache_clear()
        model.loss_function  # noqa: B018
        assert "loss_type" in caplog.text, "or this test says nothing"
    finally:
        logging.disable_propagation()
        logging.set_verbosity(before)
