"""Ways of transformers' generate: KNNLM and KNNLogitsProcessor, token for token.

What they are held to stands in tests/lm/ways.py.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.lm.test_knnlm_harness import tokenizer, words  # noqa: F401
from tests.lm.tiny_models import tiny, transformers
from tests.lm.ways import FAMILIES, PLAIN, PROMPTS, TEXT, Ways, ways_of


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
