"""Key layers found by structure, each checked against the block's own arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knnext.lm.key_layer import capture_hidden_states, find_key_module
from tests.lm.tiny_models import num_hooks, random_tokens, tiny

Check = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def sequential(norm: str, mlp: str = "mlp", after: str | None = None) -> Check:
    """y = a + after(mlp(key)) and key = norm(a): the residual a is what mlp leaves of y."""

    def check(block: Any, x: Tensor, y: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        update = getattr(block, mlp)(key)
        update = update[0] if isinstance(update, tuple) else update
        residual = y - (getattr(block, after)(update) if after else update)
        return getattr(block, norm)(residual), key

    return check


def parallel(norm: str) -> Check:
    """The feed-forward reads a norm of the block's own input."""
    return lambda block, x, y, key: (getattr(block, norm)(x), key)


def bare(block: Any, x: Tensor, y: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    update = block.fc2(block.activation_fn(block.fc1(key)))
    return block.final_layer_norm(y - update), key


def bare_post_norm(block: Any, x: Tensor, y: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    update = block.fc2(block.activation_fn(block.fc1(key)))
    return block.final_layer_norm(key + update), y


def with_residual(norm: str, mlp: str) -> Check:
    """The feed-forward adds the residual itself."""

    def check(block: Any, x: Tensor, y: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        residual = y - getattr(block, mlp)(key, torch.zeros_like(key))
        return getattr(block, norm)(residual), key

    return check


def without_norm(block: Any, x: Tensor, y: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return key + block.post_feedforward_layernorm(block.mlp(key)), y


LLAMA = sequential("post_attention_layernorm")
CHECKS: dict[str, Check] = {
    "gpt2": sequential("ln_2"),
    "llama": LLAMA,
    "mistral": LLAMA,
    "gpt_neox": parallel("post_attention_layernorm"),
    "gpt_neox_sequential": LLAMA,
    "opt": bare,
    "opt_post_norm": bare_post_norm,
    "qwen2": LLAMA,
    "gemma2": sequential("pre_feedforward_layernorm", after="post_feedforward_layernorm"),
    "olmo2": without_norm,
    "phi": parallel("input_layernorm"),
    "gptj": parallel("ln_1"),
    "falcon": parallel("input_layernorm"),
    "falcon_two_norms": parallel("ln_mlp"),
    "bloom": with_residual("post_attention_layernorm", "mlp"),
    "mixtral": LLAMA,
    "cohere": parallel("input_layernorm"),
    "mpt": with_residual("norm_2", "ffn"),
}


def last_block(model: Any) -> Any:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3]
    return lists[0][-1]


@pytest.mark.parametrize("name", CHECKS)
def test_att_is_what_the_last_feed_forward_reads(name: str) -> None:
    model = tiny(name)
    io: dict[str, Tensor] = {}

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        io["x"] = args[0] if args else kwargs["hidden_states"]
        io["y"] = output[0] if isinstance(output, tuple) else output

    handle = last_block(model).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad(), capture_hidden_states(model, "att") as captured:
        model(input_ids=random_tokens(24).view(2, 12))
        handle.remove()
        key = captured.states(2)
        got, wanted = CHECKS[name](last_block(model), io["x"], io["y"], key)
    assert key.shape == (2, 12, 32)
    torch.testing.assert_close(got.view(2, 12, 32), wanted.view(2, 12, 32), atol=2e-5, rtol=2e-5)
    assert num_hooks(model) == 0


@pytest.mark.parametrize("name", CHECKS)
def test_ffn_is_what_the_output_layer_reads(name: str) -> None:
    model = tiny(name)
    with torch.no_grad(), capture_hidden_states(model, "ffn") as captured:
        logits = model(input_ids=random_tokens(24).view(2, 12)).logits
        again = model.get_output_embeddings()(captured.states(2))
    if name == "gemma2":
        cap = model.config.final_logit_softcapping
        again = cap * torch.tanh(again / cap)
    if name == "cohere":
        again = again * model.config.logit_scale
    assert torch.equal(again, logits)


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed)


class FeedForward(nn.Module):
    """Brings its own norm, as T5's does."""

    def __init__(self, dim: int, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim) if normed else None
        self.inner = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x if self.norm is None else self.norm(x))


class Block(nn.Module):
    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(dim)
        self.second = Attention(dim)
        self.first = FeedForward(dim, kind == "inner norm") if kind != "no mlp" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mlp first":  # a parallel block in the other order
            y = self.norm(x)
            return x + self.first(y) + self.second(y)
        x = x + self.second(self.norm(x))
        return x if self.first is None else x + self.first(x)


class HomeMade(nn.Module):
    """No transformers in it; names say nothing about roles."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.parts = nn.ModuleList(Block(16, kind) for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for part in self.parts:
            x = part(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("plain", "parts.1.first"),
        ("mlp first", "parts.1.first"),
        ("inner norm", "parts.1.first.inner"),
    ],
)
def test_roles_are_told_by_what_modules_do(kind: str, name: str) -> None:
    assert str(find_key_module(HomeMade(kind), "att")) == f"module:{name}:input"


def test_refusals_list_candidates_and_say_how_to_name_one() -> None:
    for model, candidate in ((HomeMade("no mlp"), "parts.1.second"), (tiny("mamba"), ".mixer")):
        with pytest.raises(ValueError, match=r"module:NAME:input") as error:
            find_key_module(model, "att")
        assert candidate in str(error.value)
        assert num_hooks(model) == 0


def test_a_module_can_be_named() -> None:
    model = tiny("llama")
    ids = random_tokens(8)[None]
    with torch.no_grad():
        # transformers leaves hooks of its own on a model that it was asked for hidden states.
        states = copy.deepcopy(model)(input_ids=ids, output_hidden_states=True).hidden_states
        with capture_hidden_states(model, "module:model.layers.1:output") as captured:
            model(input_ids=ids)
            assert torch.equal(captured.states(1), states[2])
        with capture_hidden_states(model, "module:model.layers.1:input") as captured:
            model(input_ids=ids)
            assert torch.equal(captured.states(1), states[1])


@pytest.mark.parametrize(
    ("key_layer", "message"),
    [
        ("attn", "'att', 'ffn' or 'module:NAME:input'"),
        ("module:model.layers.1", "'att', 'ffn'"),
        ("module:model.layers.7.mlp:input", "near it: .*layers.2.mlp"),
        (3, "got 3"),
    ],
)
def test_bad_key_layers(key_layer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_key_module(tiny("llama"), key_layer)


def test_no_output_layer() -> None:
    with pytest.raises(ValueError, match="no output layer"):
        find_key_module(tiny("llama").model, "ffn")


def test_hooks_go_with_an_exception_and_modes_stay() -> None:
    model = tiny("gpt2")
    model.transformer.h[0].train()
    try:
        with pytest.raises(IndexError), capture_hidden_states(model, "att"):
            model(input_ids=torch.tensor([[10_000]]))
        find_key_module(model, "att")
        assert num_hooks(model) == 0
        assert model.transformer.h[0].mlp.training
        assert not model.training and not model.transformer.h[1].training
    finally:
        model.eval()


def test_states_before_a_forward_pass() -> None:
    with (
        capture_hidden_states(tiny("gpt2"), "att") as captured,
        pytest.raises(RuntimeError, match="did not run"),
    ):
        captured.states(1)
