"""Ways of transformers' generate: KNNLM and KNNLogitsProcessor, token for token.

What they are held to runs the mixture over the whole text at every step, with no cache and no hooks
of a processor: ``Whole``, which throws away the scores that it is given.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from knnext import KNNLM, KNNLogitsProcessor
from tests.lm.test_knnlm import index_of
from tests.lm.test_knnlm_harness import tokenizer, words  # noqa: F401
from tests.lm.tiny_models import VOCAB, num_hooks, random_tokens, tiny, transformers

TEXT = random_tokens(60)
PROMPTS = torch.stack([TEXT[:8], TEXT[20:28], random_tokens(8, seed=9)])
FAMILIES = ["gpt2", "llama", "mpt"]  # mpt's prompt gives the logits of all its positions
OPTIONS: dict[str, Any] = {"k": 4, "temperature": 0.5, "lmbda": 0.6}
PLAIN = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}


@dataclass
class Whole:
    """Scores of the mixture over all tokens so far."""

    lm: KNNLM

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        with torch.no_grad():
            return self.lm(ids).logits[:, -1]


Continue = Callable[..., Any]


@dataclass
class Ways:
    model: Any
    lm: KNNLM
    processor: KNNLogitsProcessor

    def whole(self, ids: Tensor, **options: Any) -> Any:
        # A copy, for within a KNNLM's pass the model's hooks would see another pass.
        return copy.copy(self.model).generate(ids, logits_processor=[Whole(self.lm)], **options)

    def lm_way(self, ids: Tensor, **options: Any) -> Any:
        return self.lm.generate(ids, **options)

    def processor_way(self, ids: Tensor, **options: Any) -> Any:
        return self.model.generate(ids, logits_processor=[self.processor], **options)

    @property
    def both(self) -> list[Continue]:
        return [self.lm_way, self.processor_way]


@contextmanager
def ways_of(model: Any, **options: Any) -> Iterator[Ways]:
    index, options = index_of(model, TEXT), OPTIONS | options
    with KNNLogitsProcessor(model, index, **options) as processor:
        yield Ways(model, KNNLM(model, index, **options), processor)


@pytest.fixture(scope="module", params=FAMILIES)
def ways(request: Any) -> Iterator[Ways]:
    with ways_of(copy.deepcopy(tiny(request.param))) as found:
        yield found


#: Of each kind of decoding one is quick.
QUICK = ("greedy", "no cache", "beams", "sampling cut")
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams that return several": {"num_beams": 4, "num_return_sequences": 2},
    "early stopping": {"num_beams": 2, "early_stopping": True, "length_penalty": 0.5},
    "sampling": {"do_sample": True, "top_k": 0},
    "sampling cut": {"do_sample": True, "top_k": 7, "top_p": 0.9, "temperature": 0.7},
    "several of each": {"do_sample": True, "num_return_sequences": 2},
    "beams that sample": {"do_sample": True, "num_beams": 2, "top_k": 10},
    "prefill in chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in DECODING]
)
def test_decoding(ways: Ways, name: str) -> None:
    options = {**PLAIN, **DECODING[name]}
    if name == "prefill in chunks" and ways.model.config.model_type == "mpt":
        pytest.skip("mpt itself fails on chunks")
    torch.manual_seed(3)
    wanted = ways.whole(PROMPTS, **options)
    for way in ways.both:
        torch.manual_seed(3)
        assert torch.equal(way(PROMPTS, **options), wanted)
    torch.manual_seed(3)
    assert not torch.equal(ways.model.generate(PROMPTS, **options), wanted)


@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_padded_on_the_left(ways: Ways, beams: int) -> None:
    options = {**PLAIN, "num_beams": beams}
    ids, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    for row, prompt in enumerate((TEXT[:9], TEXT[20:25])):
        ids[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    for way in ways.both:
        found = way(ids, attention_mask=mask, **options)
        assert torch.equal(found[1:, 9:], ways.whole(TEXT[None, 20:25], **options)[:, 5:])


@pytest.mark.parametrize("beams", [1, 2])
def test_scores_are_log_p_of_the_mixture(ways: Ways, beams: int) -> None:
    options = {**PLAIN, "num_beams": beams, "output_scores": True, "return_dict_in_generate": True}
    for way in ways.both:
        found = way(PROMPTS, output_logits=True, **options)
        beam = {"beam_indices": found.beam_indices} if beams > 1 else {}
        kept = ways.lm.compute_transition_scores(found.sequences, found.scores, **beam)
        with torch.no_grad():
            log_p = ways.lm(found.sequences).logits
        new = found.sequences[:, 8:]
        wanted = log_p[:, 7:-1].gather(2, new[..., None]).squeeze(2)
        torch.testing.assert_close(kept, wanted, atol=1e-4, rtol=1e-4)
        if way == ways.lm_way and beams == 1:  # of the other, logits are the model's own
            torch.testing.assert_close(found.logits[0], log_p[:, 7], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "cache",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "num_beams": 3},
    ],
)
def test_caches(name: str, cache: dict[str, Any]) -> None:
    with ways_of(tiny(name)) as ways:
        wanted = ways.whole(PROMPTS, **PLAIN, num_beams=cache.get("num_beams", 1))
        for way in ways.both:
            assert torch.equal(way(PROMPTS, **PLAIN, **cache), wanted)


@pytest.mark.slow  # torch's compiler takes seconds to be loaded
def test_what_generate_would_compile_by_itself() -> None:
    """As it does on a GPU with a static cache: KNNLM leaves it uncompiled."""
    from transformers.generation import CompileConfig

    compiling = CompileConfig(backend="eager")
    compiling._compile_all_devices = True
    options = {**PLAIN, "cache_implementation": "static", "compile_config": compiling}
    with ways_of(copy.deepcopy(tiny("llama"))) as ways:
        wanted = ways.whole(PROMPTS, **PLAIN)
        assert torch.equal(ways.lm.generate(PROMPTS, **options), wanted)
        found = ways.processor_way(PROMPTS, disable_compile=True, **options)
        assert torch.equal(found, wanted)


ASSISTED: dict[str, dict[str, Any]] = {
    "another model": {"assistant_model": "llama"},
    "itself": {"assistant_model": "itself"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "in a config": {"generation_config": {"prompt_lookup_num_tokens": 3}},
    "in the model's config": {"own": {"prompt_lookup_num_tokens": 3}},
}


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
@pytest.mark.parametrize("case", ASSISTED)
def test_assisted_decoding(name: str, case: str) -> None:
    """It reads the logits of several positions at once, which must all be mixed."""
    given = torch.cat([TEXT[:14], TEXT[:6]])[None]
    model = copy.deepcopy(tiny(name))
    options: dict[str, Any] = {**PLAIN, **ASSISTED[case]}
    if "assistant_model" in options:
        other = tiny(options["assistant_model"]) if case == "another model" else tiny(name)
        options["assistant_model"] = copy.deepcopy(other)
    if "generation_config" in options:
        config = transformers.GenerationConfig(**PLAIN, **options.pop("generation_config"))
        options = {"generation_config": config}
    with ways_of(model, lmbda=0.9) as ways:
        wanted = ways.whole(given, **PLAIN)
        for setting, value in options.pop("own", {}).items():
            setattr(model.generation_config, setting, value)
        assert torch.equal(ways.lm_way(given, **options), wanted)
        if "assistant_model" in options:
            with pytest.raises(RuntimeError, match=r"With an assistant model, .* use KNNLM"):
                ways.processor_way(given, **options)
        else:
            assert torch.equal(ways.processor_way(given, **options), wanted)


def test_early_exit() -> None:
    """Drafts come from the model itself without its last blocks, which the keys are read in."""
    with ways_of(copy.deepcopy(tiny("llama"))) as ways:
        with pytest.raises(ValueError, match="assistant_early_exit drafts without the last blocks"):
            ways.lm.generate(PROMPTS[:1], assistant_early_exit=1, **PLAIN)
        wanted = ways.whole(PROMPTS[:1], **PLAIN)
        found = ways.processor_way(PROMPTS[:1], assistant_early_exit=1, **PLAIN)
        assert torch.equal(found, wanted)


def test_streamed_from_another_thread(ways: Ways, tokenizer: Any) -> None:  # noqa: F811
    wanted = ways.whole(PROMPTS[:1], **PLAIN)[0, 8:]
    for way in ways.both:
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=120)
        arguments = {**PLAIN, "streamer": streamer}
        thread = threading.Thread(target=way, args=(PROMPTS[:1],), kwargs=arguments)
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert text.split() == words(wanted).split()


def test_a_pipeline_with_a_processor(ways: Ways, tokenizer: Any) -> None:  # noqa: F811
    """Code that takes a model's name or a PreTrainedModel, and passes generate's arguments on."""
    wanted = ways.whole(PROMPTS[:1], **PLAIN)[0, 8:]
    pipe = transformers.pipeline("text-generation", model=ways.model, tokenizer=tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    (found,) = pipe(words(PROMPTS[0]), logits_processor=[ways.processor], **options)
    assert found["generated_text"].split()[:6] == words(wanted).split()


# The processor


def test_threads_that_share_a_processor() -> None:
    with ways_of(copy.deepcopy(tiny("llama"))) as ways:
        wanted = [ways.whole(row[None], **PLAIN) for row in PROMPTS]
        found: dict[int, Tensor] = {}

        def work(number: int) -> None:
            found[number] = ways.processor_way(PROMPTS[number][None], **PLAIN)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[n], wanted[n]) for n in range(3))


def test_processors_after_it_act_on_the_mixture() -> None:
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.5)
    with ways_of(tiny("gpt2"), lmbda=0.999, k=1, temperature=1e-3) as ways:
        wanted = ways.lm.generate(TEXT[None, :8], repetition_penalty=1.5, **PLAIN)
        found = ways.model.generate(
            TEXT[None, :8], logits_processor=[ways.processor, penalty], **PLAIN
        )
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"min_new_tokens": 3, "eos_token_id": 5},
        {"suppress_tokens": [7]},
        {"guidance_scale": 2.0},
        {"no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_scores_that_another_changed_before_it(options: dict[str, Any]) -> None:
    with (
        ways_of(tiny("llama")) as ways,
        pytest.raises(RuntimeError, match=r"the model's latest forward pass: .* after this one"),
    ):
        ways.processor_way(PROMPTS, **(PLAIN | options))


def test_scores_of_another_model_or_none_at_all() -> None:
    model = tiny("llama")
    with (
        KNNLogitsProcessor(model, index_of(model, TEXT)) as alone,
        pytest.raises(RuntimeError, match="no forward pass of the model was seen"),
    ):
        tiny("gpt2").generate(PROMPTS, logits_processor=[alone], **PLAIN)
    with ways_of(model) as ways:
        ways.processor_way(PROMPTS, **PLAIN)
        for ids in (PROMPTS, PROMPTS[:1]):  # of a batch of the same size, and of another
            with pytest.raises(RuntimeError, match="another model made them"):
                tiny("gpt2").generate(ids, logits_processor=[ways.processor], **PLAIN)
        with ways.lm.attached(), pytest.raises(RuntimeError, match="not the logits"):
            ways.processor_way(PROMPTS, **PLAIN)  # the mixture would be mixed again


def test_a_closed_processor() -> None:
    model = copy.deepcopy(tiny("llama"))
    with ways_of(model) as ways:
        assert num_hooks(model) == 2
    assert num_hooks(model) == 0
    ways.processor.close()
    with pytest.raises(RuntimeError, match="this processor is closed"):
        ways.processor_way(PROMPTS, **PLAIN)


def test_a_processor_that_nobody_has() -> None:
    model = copy.deepcopy(tiny("llama"))
    gone = weakref.ref(KNNLogitsProcessor(model, index_of(model, TEXT), **OPTIONS))
    gc.collect()
    assert gone() is None and num_hooks(model) == 0


def test_lmbda_0_leaves_the_scores() -> None:
    with ways_of(tiny("llama"), lmbda=0) as ways:
        wanted = ways.model.generate(PROMPTS, repetition_penalty=1.3, **PLAIN)
        assert torch.equal(ways.processor_way(PROMPTS, repetition_penalty=1.3, **PLAIN), wanted)


@pytest.mark.parametrize("layer", ["att", "ffn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_processor_for_other_layers_and_dtypes(layer: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny("llama")).to(dtype)
    index = index_of(model, TEXT, key_layer=layer)
    with KNNLogitsProcessor(model, index, **OPTIONS) as processor:
        found = model.generate(PROMPTS, logits_processor=[processor], **PLAIN)
    assert torch.equal(found, KNNLM(model, index, **OPTIONS).generate(PROMPTS, **PLAIN))


@pytest.mark.slow  # torch's compiler takes seconds to be loaded
def test_a_compiled_model_is_refused_by_a_processor() -> None:
    model = copy.deepcopy(tiny("llama"))
    index = index_of(model, TEXT)
    with pytest.raises(ValueError, match=r"compiled code.*load_lm\(compile=True\).*KNNLM"):
        KNNLogitsProcessor(torch.compile(model, backend="eager"), index, **OPTIONS)
    for block in model.model.layers[:-1]:
        block.compile(backend="eager")  # as load_lm does
    with ways_of(model) as ways:
        assert torch.equal(ways.processor_way(PROMPTS, **PLAIN), ways.lm_way(PROMPTS, **PLAIN))


@pytest.mark.slow  # torch's compiler takes seconds to be loaded
def test_a_model_that_is_compiled_after_its_processor() -> None:
    model = copy.deepcopy(tiny("llama"))
    with ways_of(model) as ways:
        wanted = ways.lm_way(PROMPTS, **PLAIN)
        ways.processor_way(PROMPTS, **PLAIN)
        compiled = torch.compile(model, backend="eager")
        found = compiled.generate(PROMPTS, logits_processor=[ways.processor], **PLAIN)
        assert torch.equal(found, wanted)


def test_an_adapter() -> None:
    """peft's wrapper hands generate to the model inside."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(tiny("llama")), config).eval()
    with ways_of(model) as ways:
        wanted = ways.model.get_base_model().generate(
            PROMPTS, logits_processor=[Whole(ways.lm)], use_cache=False, **PLAIN
        )
        assert torch.equal(ways.lm_way(PROMPTS, **PLAIN), wanted)
        found = model.generate(input_ids=PROMPTS, logits_processor=[ways.processor], **PLAIN)
        assert torch.equal(found, wanted)


def test_bad_arguments_of_a_processor() -> None:
    model = tiny("llama")
    index = index_of(model, TEXT)
    for options, message in (({"k": 0}, "k must be"), ({"lmbda": 2}, "lmbda must be")):
        with pytest.raises(ValueError, match=message):
            KNNLogitsProcessor(model, index, **{**OPTIONS, **options})
    assert num_hooks(model) == 0


# What else is done with a model


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
def test_what_is_not_offered(ways: Ways, name: str, message: str) -> None:
    with pytest.raises(AttributeError, match=message):
        getattr(ways.lm, name)
    assert not hasattr(ways.lm, name)


def test_continuous_batching_is_refused_while_attached(ways: Ways) -> None:
    """It runs in a thread of its own, where the base model would answer for the mixture."""
    config = transformers.GenerationConfig(**PLAIN)
    with ways.lm.attached() as model:
        with ways.lm.attached():
            pass
        with pytest.raises(RuntimeError, match="attached to this model: continuous batching"):
            model.generate_batch([[1, 2, 3]], generation_config=config)
        with pytest.raises(RuntimeError, match="continuous batching"):
            model.init_continuous_batching(config)
    assert "init_continuous_batching" not in vars(ways.model)


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
