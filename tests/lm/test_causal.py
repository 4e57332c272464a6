"""Models that see the future are refused, wherever keys are read, and no causal one is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knnext.errors import ModelError
from knnext.lm.causal import NotCausalError, check_causal, check_config
from knnext.lm.hidden_states import hidden_states
from knnext.lm.key_layer import capture_hidden_states, find_key_module
from knnext.lm.knnlm import KNNLM
from tests.lm.every_model import every
from tests.lm.tiny_models import num_hooks, random_tokens, tiny, transformers

SEEING = ["bert", "roberta", "electra", "xlnet", "xlm", "gemma4_text, both directions", "cpmant"]
CAUSAL = ["gpt2", "llama", "mixtral", "mamba", "bloom", "mpt", "opt", "gpt_neox", "falcon"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SEEING)
def test_models_that_see_the_future_are_refused(name: str, dtype: torch.dtype) -> None:
    if name == "cpmant" and dtype == torch.bfloat16:
        pytest.skip("does not run in bfloat16")
    model = every(name).to(dtype)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(NotCausalError, match=r"sees the future.*causal"):
            check_causal(model)
    assert num_hooks(model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_pass(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny(name)).to(dtype)
    check_causal(model)
    assert num_hooks(model) == 0 and not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["bert, is_decoder", "roberta, is_decoder", "reformer", "bart"])
def test_decoders_of_such_families_pass(name: str) -> None:
    check_causal(every(name))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Blip", r"pixel_values.*Give .* model\.text_decoder \(BlipTextLMHeadModel\)$"),
        ("Blip2", r"pixel_values.*Give .* model\.language_model \(OPTForCausalLM\)$"),
    ],
)
def test_a_model_that_wants_more_than_tokens(kind: str, message: str) -> None:
    """It is told so, with the part of it that could be given."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "vocab_size": 97, "encoder_hidden_size": 32}
    text = {**small, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text if kind == "Blip2" else {**small, "is_decoder": True},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        **({"qformer_config": small} if kind == "Blip2" else {}),
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    for layer in ("att", "ffn"):
        with pytest.raises(ModelError, match=rf"fails on tokens by themselves.*{message}"):
            find_key_module(model, layer)
    part = model.text_decoder if kind == "Blip" else model.language_model
    assert find_key_module(part, "att").name.endswith(("layer.1.intermediate", "layers.1.fc1"))
    assert num_hooks(model) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["att", "ffn", "module:model.layers.1.mlp:input"])
def test_weights_that_are_not_finite(layer: str, value: float) -> None:
    """A training that diverged: no derivative tells anything about such a model."""
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(ModelError, match="LlamaForCausalLM gives states that are not finite"):
        find_key_module(model, layer)


class Index:
    def search(self, queries: Tensor, k: int) -> Any: ...

    def tokens(self, indices: Tensor) -> Any: ...


def test_all_that_reads_keys_refuses() -> None:
    model = every("bert")
    for layer in ("att", "ffn", "module:bert.encoder.layer.0:output"):
        with pytest.raises(NotCausalError):
            find_key_module(model, layer)
        with pytest.raises(NotCausalError):
            hidden_states(model, random_tokens(20), key_layer=layer)
        with pytest.raises(NotCausalError), capture_hidden_states(model, layer):
            pass
        with pytest.raises(NotCausalError):
            KNNLM(model, Index(), key_layer=layer)


@pytest.mark.parametrize("name", ["T5", "Marian", "Bart", "MBart", "Pegasus", "Whisper"])
def test_encoder_decoders_are_refused_by_config(name: str) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")()
    with pytest.raises(NotCausalError, match=r"is an encoder-decoder.*causal") as error:
        check_config(config, name)
    assert len(str(error.value)) < 200


class Leaky(nn.Module):
    """A model of our own, no transformers in it; ``kind`` is how a later token is seen."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.kind = kind

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head if self.kind != "no head" else None

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.kind in ("mean", "no head"):
            x = x + 1e-5 * x.mean(dim=1, keepdim=True)  # far below what rounding to bf16 would show
        elif self.kind == "one ahead":
            x = x + x.roll(-1, dims=1)
        elif self.kind == "ids":
            x = x * (1 + input_ids.float().mean(dim=1).round()[:, None, None])
        elif self.kind == "sort":
            order = x.detach().sum(-1).argsort(dim=1)
            x = x + 0.1 * order[..., None]
        elif self.kind == "no grad":
            with torch.no_grad():
                x = x + x.flip(1)
        elif self.kind == "cumulative":
            x = x.cumsum(dim=1)
        return self.head(x)


@pytest.mark.parametrize("kind", ["mean", "no head", "one ahead", "ids", "sort", "no grad"])
def test_every_way_of_seeing_is_found(kind: str) -> None:
    with pytest.raises(NotCausalError):
        check_causal(Leaky(kind))


@pytest.mark.parametrize("kind", ["cumulative", "nothing"])
def test_a_causal_model_of_ones_own_passes(kind: str) -> None:
    check_causal(Leaky(kind))


def test_a_model_is_tried_once_and_left_as_it_was() -> None:
    model = copy.deepcopy(tiny("gpt2")).train()
    model.transformer.h[1].eval()
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    check_causal(model)
    first = len(calls)
    check_causal(model)
    handle.remove()
    assert first > 0 and len(calls) == first
    assert model.training and not model.transformer.h[1].training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_short_context_is_enough() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    check_causal(model)
    assert len(list(hidden_states(model, random_tokens(20) % 50))) > 0


def test_the_trial_works_in_inference_mode() -> None:
    with torch.inference_mode():
        check_causal(copy.deepcopy(tiny("llama")))
        with pytest.raises(NotCausalError):
            check_causal(Leaky("one ahead"))
