"""Tiny causal LMs with random weights, one of each kind of block, made without a network."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
# Configs of models this small leave the ids of absent special tokens out of range, with a warning.
transformers.logging.set_verbosity_error()

VOCAB = 97
_ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
_PLAIN = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_OPT = {**_PLAIN, "ffn_dim": 56, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
_HEADS = {**_ROPE, "num_key_value_heads": 4}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {**_GPT, "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaConfig", _ROPE),
    "mistral": ("MistralConfig", _ROPE),
    "gpt_neox": ("GPTNeoXConfig", _HEADS),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**_HEADS, "use_parallel_residual": False}),
    "opt": ("OPTConfig", _OPT),
    # ffn_dim = hidden_size: no width tells the two projections apart
    "opt_post_norm": (
        "OPTConfig",
        {**_OPT, "do_layer_norm_before": False, "ffn_dim": 32, "word_embed_proj_dim": 16},
    ),
    "qwen2": ("Qwen2Config", _ROPE),
    "gemma2": ("Gemma2Config", {**_ROPE, "head_dim": 8}),
    "olmo2": ("Olmo2Config", _ROPE),
    "phi": ("PhiConfig", _ROPE),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "falcon": ("FalconConfig", _PLAIN),
    "falcon_two_norms": (
        "FalconConfig",
        {**_PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mixtral": ("MixtralConfig", {**_ROPE, "num_local_experts": 4}),
    "cohere": ("CohereConfig", _ROPE),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 3, "n_heads": 4}),
    "mamba": ("MambaConfig", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}),
}


@functools.cache
def tiny(name: str) -> Any:
    """The model in eval mode; one for all tests, which is itself a test that none changes it."""
    class_name, options = CONFIGS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, class_name)(**options), trust_remote_code=False
    )
    # Norms begin as the identity and biases as zero, which would hide a key taken a step too early.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.eval()


def num_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def random_tokens(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator)
