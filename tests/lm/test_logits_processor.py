"""KNNLogitsProcessor: what it asks of the scores it is given, and what it leaves on the model."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from knnext import KNNLM, KNNLogitsProcessor
from tests.lm.test_knnlm import index_of
from tests.lm.tiny_models import num_hooks, tiny, transformers
from tests.lm.ways import OPTIONS, PLAIN, PROMPTS, TEXT, Whole, ways_of


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
