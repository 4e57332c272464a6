"""KNNLM: the mixture itself, transformers' generate on top of it, and a base model left alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from knnext import reference
from knnext.lm.hidden_states import hidden_states
from knnext.lm.knnlm import KNNLM
from knnext.lm.logits_processor import KNNLogitsProcessor
from tests.lm.tiny_models import VOCAB, num_hooks, random_tokens, tiny, transformers

NAMES = ["gpt2", "llama", "gpt_neox", "opt", "mistral", "gemma2"]


@dataclass
class Store:
    """What KNNLM reads of a datastore."""

    dtype: torch.dtype = torch.float32
    dim: int | None = None
    key_layer: str | None = None
    vocab_size: int | None = None


@dataclass
class MemoryIndex:
    """All keys in memory, searched by the reference."""

    keys: Tensor
    values: Tensor
    datastore: Store = field(default_factory=Store)
    searched: list[int] = field(default_factory=list)

    def search(self, queries: Tensor, k: int, exclude_documents: Any = None) -> tuple[Tensor, ...]:
        assert queries.dtype == self.datastore.dtype
        self.searched.append(len(queries))
        return reference.knn_search(queries.float(), self.keys.float(), k)

    def tokens(self, indices: Tensor) -> Tensor:
        return torch.where(indices < 0, -1, self.values[indices])


def index_of(model: Any, tokens: Tensor, dtype: torch.dtype = torch.float32, **store: Any) -> Any:
    layer = store.get("key_layer") or "att"
    batches = list(hidden_states(model, tokens, dtype=dtype, key_layer=layer))
    keys = torch.cat([b.keys for b in batches])
    targets = torch.cat([b.targets for b in batches])
    return MemoryIndex(keys, targets, Store(dtype, **store))


def greedy(model: Any, ids: Tensor, count: int = 12, **options: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0} | options
    return model.generate(ids, eos_token_id=None, **options)


def by_hand(model: Any, index: Any, ids: Tensor, layer: str, k: int, t: float, lm: float) -> Tensor:
    """log p of the mixture in float64, from plain probabilities."""
    key = {"att": lambda m: m.transformer.h[-1].mlp, "ffn": lambda m: m.lm_head}[layer](model)
    read: list[Tensor] = []
    handle = key.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    with torch.no_grad():
        p_lm = model(input_ids=ids).logits.double().softmax(-1)
    handle.remove()
    squares = torch.cdist(read[0].double(), index.keys.double()[None]) ** 2
    distances, rows = squares.topk(k, largest=False)
    weights = (-distances / t).softmax(-1)
    p_knn = torch.zeros_like(p_lm).scatter_add_(-1, index.values[rows], weights)
    return ((1 - lm) * p_lm + lm * p_knn).log()


@pytest.mark.parametrize("layer", ["att", "ffn"])
@pytest.mark.parametrize("lmbda", [0.3, 1.0])
def test_logits_are_log_p_of_the_mixture(layer: str, lmbda: float) -> None:
    model = tiny("gpt2")
    index = index_of(model, random_tokens(60), key_layer=layer)
    ids = random_tokens(30, seed=5).view(2, 15)
    with torch.no_grad():
        output = KNNLM(model, index, k=8, temperature=2.0, lmbda=lmbda)(input_ids=ids)
    expected = by_hand(model, index, ids, layer, 8, 2.0, lmbda)
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, expected.float(), atol=2e-4, rtol=2e-4)
    if lmbda < 1:
        sums = output.logits.exp().sum(-1)
        torch.testing.assert_close(sums, torch.ones(2, 15), atol=1e-5, rtol=0)


def test_loss_is_the_mean_nll_of_the_mixture() -> None:
    model = tiny("gpt2")
    mixed = KNNLM(model, index_of(model, random_tokens(60)), k=8, lmbda=0.4)
    ids = random_tokens(30, seed=5).view(2, 15)
    labels = ids.clone()
    labels[0, :6] = -100
    with torch.no_grad():
        output = mixed(input_ids=ids, labels=labels)
    wanted = [
        -output.logits[b, i, labels[b, i + 1]].item()
        for b in range(2)
        for i in range(14)
        if labels[b, i + 1] != -100
    ]
    assert output.loss.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-6)


def test_a_learned_lmbda_and_temperature_get_gradients() -> None:
    model = tiny("gpt2")
    temperature = torch.tensor(2.0, requires_grad=True)
    lmbda = torch.tensor(0.3, requires_grad=True)
    mixed = KNNLM(model, index_of(model, random_tokens(60)), 8, temperature, lmbda)
    ids = random_tokens(15)[None]
    mixed(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    assert temperature.grad is not None and temperature.grad != 0
    assert lmbda.grad is not None and lmbda.grad < 0  # the text is the store's own: more is better


@pytest.mark.parametrize("name", NAMES)
def test_lmbda_0_generates_as_the_base(name: str) -> None:
    model = tiny(name)
    index = index_of(model, random_tokens(40))
    mixed = KNNLM(model, index, k=4, lmbda=0.0)
    ids = random_tokens(12, seed=3).view(2, 6)
    assert torch.equal(greedy(mixed, ids), greedy(model, ids))
    assert torch.equal(greedy(mixed, ids, num_beams=3), greedy(model, ids, num_beams=3))
    torch.manual_seed(1)
    sampled = greedy(mixed, ids, do_sample=True, temperature=0.8, top_k=20)
    torch.manual_seed(1)
    assert torch.equal(sampled, greedy(model, ids, do_sample=True, temperature=0.8, top_k=20))
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)
        assert torch.equal(mixed(input_ids=ids).logits, expected)
    assert index.searched == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_lmbda_1_copies_the_planted_text(name: str, options: dict[str, Any]) -> None:
    model, text = tiny(name), random_tokens(40)
    mixed = KNNLM(model, index_of(model, text), k=4, temperature=1e-4, lmbda=1.0)
    given = text[None, :8]
    assert torch.equal(greedy(mixed, given, **options)[0], text[:20])
    assert not torch.equal(greedy(model, given)[0], text[:20])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_batches_generate_as_single_prompts(name: str, beams: int) -> None:
    model, text = tiny(name), random_tokens(60)
    mixed = KNNLM(model, index_of(model, text), k=4, temperature=0.5, lmbda=0.6)
    prompts = [text[:9], text[20:25], random_tokens(7, seed=9)]
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, 9 - len(prompt) :], mask[i, 9 - len(prompt) :] = prompt, 1
    together = greedy(mixed, ids, attention_mask=mask, num_beams=beams)
    for i, prompt in enumerate(prompts):
        assert torch.equal(
            together[i, 9:], greedy(mixed, prompt[None], num_beams=beams)[0, len(prompt) :]
        )


def test_the_cache_changes_nothing() -> None:
    model, text = tiny("llama"), random_tokens(60)
    mixed = KNNLM(model, index_of(model, text), k=4, temperature=0.5, lmbda=0.6)
    ids = random_tokens(12, seed=4).view(2, 6)
    assert torch.equal(greedy(mixed, ids, use_cache=True), greedy(mixed, ids, use_cache=False))


def test_prompt_lookup_decodes_the_same_text() -> None:
    """It reads the logits of several positions at once, which must all be mixed."""
    model, text = tiny("llama"), random_tokens(60)
    mixed = KNNLM(model, index_of(model, text), k=4, temperature=0.5, lmbda=0.9)
    given = torch.cat([text[:14], text[:6]])[None]
    assert torch.equal(greedy(mixed, given, prompt_lookup_num_tokens=3), greedy(mixed, given))


def test_repetition_penalty_acts_on_the_mixture() -> None:
    model, text = tiny("gpt2"), random_tokens(40)
    mixed = KNNLM(model, index_of(model, text), k=1, temperature=1e-3, lmbda=0.999)
    output = greedy(
        mixed,
        text[None, :8],
        count=3,
        output_scores=True,
        return_dict_in_generate=True,
        repetition_penalty=1.5,
    )
    with torch.no_grad():
        log_p = mixed(input_ids=text[None, :8]).logits[0, -1]
    seen = text[:8].unique()
    torch.testing.assert_close(output.scores[0][0, seen], 1.5 * log_p[seen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "mpt"])  # mpt: does not know logits_to_keep by itself
def test_only_the_last_position_is_searched(name: str) -> None:
    model = tiny(name)
    index = index_of(model, random_tokens(40))
    greedy(KNNLM(model, index, k=4, lmbda=0.5), random_tokens(20).view(2, 10), count=3)
    assert index.searched == [2, 2, 2]


def test_padding_is_not_searched_and_stays_the_lm() -> None:
    model = tiny("gpt2")
    index = index_of(model, random_tokens(40))
    mixed = KNNLM(model, index, k=4, lmbda=0.5)
    ids, mask = random_tokens(16).view(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[1, :5] = 0
    with torch.no_grad():
        logits = mixed(input_ids=ids, attention_mask=mask).logits
        base = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    assert index.searched == [11]
    torch.testing.assert_close(logits[1, :5], base[1, :5])
    assert (logits[1, 5:] - base[1, 5:]).abs().max() > 0.1


@pytest.mark.parametrize("layer", ["att", "ffn"])
@pytest.mark.parametrize("keep", [3, torch.tensor([2, 5])])
def test_logits_to_keep(layer: str, keep: Any) -> None:
    model = tiny("gpt2")
    index = index_of(model, random_tokens(40), key_layer=layer)
    mixed, ids = KNNLM(model, index, k=4, lmbda=0.5), random_tokens(16).view(2, 8)
    with torch.no_grad():
        whole = mixed(input_ids=ids).logits
        index.searched.clear()
        part = mixed(input_ids=ids, logits_to_keep=keep).logits
    rows = slice(-keep, None) if isinstance(keep, int) else keep
    torch.testing.assert_close(part, whole[:, rows])
    assert index.searched == [part.shape[0] * part.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("store", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_model_and_store(dtype: torch.dtype, store: torch.dtype) -> None:
    model, text = copy.deepcopy(tiny("llama")).to(dtype), random_tokens(40)
    mixed = KNNLM(model, index_of(model, text, dtype=store), k=4, temperature=1e-3, lmbda=1.0)
    assert torch.equal(greedy(mixed, text[None, :8])[0], text[:20])


def test_the_base_model_is_left_as_it_was() -> None:
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes, ids = set(vars(model)), random_tokens(8)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        mixed = KNNLM(model, index_of(model, random_tokens(40)), k=4)
        mixed(input_ids=ids)
        greedy(mixed, ids)
        assert torch.equal(model(input_ids=ids).logits, logits)
    assert set(vars(model)) == attributes
    assert num_hooks(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert mixed.config is model.config and mixed.device == model.device
    assert mixed.generation_config is model.generation_config


def test_hooks_go_when_the_search_fails() -> None:
    model = tiny("llama")
    index = index_of(model, random_tokens(40))
    mixed, ids = KNNLM(model, index, k=4), random_tokens(8)[None]
    index.search = lambda *args: (_ for _ in ()).throw(OSError("disk gone"))
    for call in (lambda: mixed(input_ids=ids), lambda: greedy(mixed, ids)):
        with pytest.raises(OSError, match="disk gone"):
            call()
        assert num_hooks(model) == 0
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (1, 8, VOCAB)


def test_attached_lends_the_base_model() -> None:
    model = tiny("llama")
    mixed, ids = KNNLM(model, index_of(model, random_tokens(40)), k=4), random_tokens(8)[None]
    with torch.no_grad():
        expected = mixed(input_ids=ids).logits
        with mixed.attached() as lent:
            assert lent is model
            assert torch.equal(lent(input_ids=ids).logits, expected)
            assert torch.equal(mixed(input_ids=ids).logits, expected)  # and not mixed twice
            assert torch.equal(lent(input_ids=ids, return_dict=False)[0], expected)
    assert num_hooks(model) == 0


def test_k_beyond_the_store() -> None:
    model, text = tiny("llama"), random_tokens(40)
    mixed = KNNLM(model, index_of(model, text), k=200, temperature=1e-3, lmbda=1.0)
    assert torch.equal(greedy(mixed, text[None, :8])[0], text[:20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"k": 2.0}, "k must be an integer"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"temperature": "0.5x"}, "temperature must be a number or a tensor, got '0.5x'"),
        ({"temperature": None}, "temperature must be a number or a tensor, got None"),
        ({"lmbda": True}, "lmbda must be a number or a tensor, got True"),
        ({"lmbda": [0.5]}, "lmbda must be a number or a tensor"),
        ({"lmbda": 1.5}, "lmbda must be from 0 to 1, got 1.5"),
        ({"key_layer": "ffn"}, "key_layer='ffn', but the datastore's keys are of 'att'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    index = MemoryIndex(torch.zeros(1, 32), torch.zeros(1), Store(key_layer="att"))
    with pytest.raises((TypeError, ValueError), match=message):
        KNNLM(tiny("llama"), index, **options)


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (Store(dim=48), "dim=48, but .* of this model 32"),
        (Store(vocab_size=500), "vocabulary of 500, but the model's logits have 97"),
    ],
)
def test_a_store_of_another_model(store: Store, message: str) -> None:
    index = MemoryIndex(torch.zeros(1, 32), torch.zeros(1), store)
    with pytest.raises(ValueError, match=message):
        KNNLM(tiny("llama"), index)


@pytest.mark.parametrize("make", [KNNLM, KNNLogitsProcessor])
def test_a_store_of_joined_layers(make: Any) -> None:
    store = Store(key_layer="att+ffn", dim=64)
    index = MemoryIndex(torch.zeros(1, 64), torch.zeros(1), store)
    with pytest.raises(ValueError, match=r"'att\+ffn' joins several layers.*a KNNLM.* read one"):
        make(tiny("llama"), index)


@pytest.mark.parametrize("make", [KNNLM, KNNLogitsProcessor])
def test_what_is_no_index(make: Any) -> None:
    for index in (Store(), "STORE", None, random_tokens(4)):
        with pytest.raises(TypeError, match=r"index must have search.*ExactIndex\(Datastore.*got"):
            make(tiny("llama"), index)


@pytest.mark.parametrize("make", [KNNLM, KNNLogitsProcessor])
def test_what_is_no_causal_lm(make: Any) -> None:
    model = tiny("llama")
    index = index_of(model, random_tokens(40))
    with pytest.raises(TypeError, match="model is a KNNLM: give its base model"):
        make(KNNLM(model, index), index)
    for name in ("MODEL", None):
        with pytest.raises(TypeError, match=f"model must be a loaded model .* got .*{name}"):
            make(name, index)
    headless = transformers.LlamaModel(model.config).eval()
    with pytest.raises(TypeError, match=r"LlamaModel gave .* output layer.*AutoModelForCausalLM"):
        make(headless, index)
    classifier = transformers.LlamaForSequenceClassification(model.config).eval()
    with pytest.raises(ValueError, match=r"logits of shape \(1, 2\) for 7 tokens"):
        make(classifier, index)


def test_its_name() -> None:
    model = tiny("llama")
    lm = KNNLM(model, index_of(model, random_tokens(40)))
    assert repr(lm).startswith("KNNLM(\n  (model): LlamaForCausalLM(") and repr(lm).endswith(")")
    assert type(lm).__name__ == "KNNLM"


def test_a_knnlm_drafts_for_nobody() -> None:
    model = tiny("llama")
    lm, ids = KNNLM(model, index_of(model, random_tokens(40))), random_tokens(6)[None]
    for other in (lm, model):
        with pytest.raises(AttributeError, match="give its base model as assistant_model"):
            greedy(other, ids, assistant_model=lm)
    assert torch.equal(greedy(lm, ids, assistant_model=model), greedy(lm, ids))
    assert num_hooks(model) == 0
