"""KNNLM where a transformers model is expected: pipeline, harness, and inputs at the edge."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from knnext.lm.knnlm import KNNLM
from tests.lm.test_knnlm import greedy, index_of
from tests.lm.tiny_models import VOCAB, num_hooks, random_tokens, tiny, transformers

TEXT = random_tokens(60)


def make(name: str = "llama", **options: Any) -> KNNLM:
    model = tiny(name)
    options = {"k": 4, "temperature": 1e-3, "lmbda": 0.9} | options
    return KNNLM(model, index_of(model, TEXT), **options)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    words = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        model_max_length=64,
    )


def words(ids: Any) -> str:
    return " ".join(f"w{int(token)}" for token in ids)


def test_what_is_asked_of_a_model() -> None:
    mixed = make()
    base = mixed.model
    assert mixed.can_generate() is True and mixed.dtype == torch.float32
    assert mixed.device == base.device and mixed.name_or_path == base.name_or_path
    assert mixed.get_input_embeddings() is base.get_input_embeddings()
    assert mixed.get_output_embeddings() is base.get_output_embeddings()
    assert mixed.loss_type == base.loss_type and mixed.accepts_loss_kwargs is True
    mixed.tie_weights()
    assert mixed.eval() is mixed and mixed.to("cpu") is mixed
    half = copy.deepcopy(base).to(torch.bfloat16)
    assert KNNLM(half, index_of(half, TEXT), 4).dtype == torch.bfloat16


def test_no_other_method_of_the_base_answers_for_the_mixture() -> None:
    """What is not named could call the base model, and give its answers for the mixture's."""
    for name in ("prepare_inputs_for_generation", "generate_batch", "save_pretrained"):
        with pytest.raises(AttributeError):
            getattr(make(), name)


def test_pipeline(tokenizer: Any) -> None:
    mixed = make()
    pipe = transformers.pipeline("text-generation", model=mixed, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    (alone,) = pipe(words(TEXT[:8]), **options)
    assert alone["generated_text"].split() == words(TEXT[8:13]).split()
    both = pipe([words(TEXT[:8]), words(TEXT[3:20])], batch_size=2, **options)
    assert [found[0]["generated_text"].split()[:2] for found in both] == [
        words(greedy(mixed, ids[None], 2)[0, -2:]).split() for ids in (TEXT[:8], TEXT[3:20])
    ]
    assert num_hooks(mixed.model) == 0


def test_lm_evaluation_harness(tokenizer: Any) -> None:
    """The real one, where it is installed: all its request types, against the mixture by hand."""
    harness = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    mixed = make()
    wrapped = harness.HFLM(pretrained=mixed, tokenizer=tokenizer, batch_size=2)

    def requests(kind: str, *arguments: Any) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]

    def log_p(ids: torch.Tensor, first: int) -> float:
        with torch.no_grad():
            rows = mixed(input_ids=ids[None]).logits[0]
        return sum(rows[i - 1, ids[i]].item() for i in range(first, len(ids)))

    pairs = [(TEXT[:8], TEXT[8:12]), (TEXT[3:7], TEXT[20:22]), (TEXT[:2], TEXT[2:9])]
    asked = [(words(context), " " + words(rest)) for context, rest in pairs]
    found = wrapped.loglikelihood(requests("loglikelihood", *asked))
    for (context, rest), (score, _) in zip(pairs, found, strict=True):
        wanted = log_p(torch.cat([context, rest]), len(context))
        assert score == pytest.approx(wanted, rel=1e-4)
    assert found[0][1] is True  # the planted text, word for word
    rolled = wrapped.loglikelihood_rolling(requests("loglikelihood_rolling", (words(TEXT[:30]),)))
    wanted = log_p(torch.cat([torch.tensor([wrapped.prefix_token_id]), TEXT[:30]]), 1)
    assert rolled[0] == pytest.approx(wanted, rel=1e-4)
    until = {"until": [f"w{int(TEXT[12])}"], "max_gen_toks": 8, "do_sample": False}
    texts = wrapped.generate_until(requests("generate_until", (words(TEXT[:8]), until)))
    assert texts[0].split() == words(TEXT[8:12]).split()


# Inputs at the edge


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "mpt", "bloom"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_an_empty_batch(name: str, shape: tuple[int, int]) -> None:
    mixed, ids = make(name), torch.zeros(shape, dtype=torch.int64)
    output = mixed(input_ids=ids, labels=ids)
    assert output.logits.shape == (*shape, VOCAB) and output.logits.dtype == torch.float32
    assert output.loss.isnan() and mixed(ids).loss is None
    assert mixed.index.searched == []
    assert torch.equal(mixed(ids, return_dict=False)[0], output.logits)
    if shape[0] == 0:
        assert greedy(mixed, ids).shape == shape
    else:
        with pytest.raises(ValueError, match="a token to begin with"):
            greedy(mixed, ids)


def test_a_batch_of_padding_alone() -> None:
    mixed, ids = make("gpt2", lmbda=0.5), random_tokens(5)[None]
    with torch.no_grad():
        logits = mixed(ids, attention_mask=torch.zeros_like(ids)).logits
        base = mixed.model(ids, attention_mask=torch.zeros_like(ids)).logits
    assert torch.equal(logits, base.log_softmax(-1)) and mixed.index.searched == []


@pytest.mark.parametrize("k", [np.int64(3), np.int32(3), np.uint8(3), torch.tensor(3)])
def test_k_of_any_integer_type(k: Any) -> None:
    mixed = make(k=k)
    assert type(mixed.k) is int
    ids = random_tokens(6)[None]
    with torch.no_grad():
        assert torch.equal(mixed(ids).logits, make(k=3)(ids).logits)


@pytest.mark.parametrize("k", [True, np.bool_(True), np.float64(3), "3", None, np.int64(0), -1])
def test_k_of_no_integer_type(k: Any) -> None:
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        make(k=k)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_numbers_of_numpy(kind: Any) -> None:
    mixed = make(temperature=kind(0.5), lmbda=kind(0.25))
    assert type(mixed.temperature) is float and type(mixed.lmbda) is float
    ids = random_tokens(6)[None]
    with torch.no_grad():
        assert torch.equal(mixed(ids).logits, make(temperature=0.5, lmbda=0.25)(ids).logits)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_generate_past_the_context(name: str, lmbda: float) -> None:
    """64 positions; the model itself says "index out of range in self"."""
    mixed = make(name, lmbda=lmbda)
    config = transformers.GenerationConfig(max_new_tokens=40, pad_token_id=0, eos_token_id=None)
    for options in ({"max_new_tokens": 40}, {"max_length": 70}, {"generation_config": config}):
        with pytest.raises(ValueError, match=r"30 tokens given and 40 asked for .* 64"):
            mixed.generate(random_tokens(30)[None], **options)
    with torch.no_grad(), pytest.raises(ValueError, match=r"70 tokens given are more than the 64"):
        mixed(random_tokens(70)[None])
    assert num_hooks(mixed.model) == 0
    assert greedy(mixed, random_tokens(30)[None], 34).shape == (1, 64)


def test_models_without_a_last_position_go_on() -> None:
    """Rotary positions have no end that a model would fail at, and neither has the KNNLM."""
    assert greedy(make("llama"), random_tokens(60)[None], 8).shape == (1, 68)


def test_other_errors_are_not_explained_by_the_context() -> None:
    mixed = make("gpt2")
    with pytest.raises(IndexError, match="out of range"):
        mixed(torch.tensor([[5, 10_000]]))
    mixed.index.search = lambda *_: (_ for _ in ()).throw(RuntimeError("of the search"))
    with pytest.raises(RuntimeError, match=r"^of the search$"):
        greedy(mixed, random_tokens(5)[None], 3)
