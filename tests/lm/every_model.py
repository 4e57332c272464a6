"""A tiny model of every causal LM that the installed transformers knows, made without a network.

Sizes that configs share by name are set for all of them (``_SIZES``); what a family wants besides
stands in ``_MORE``. A family that cannot be made small, or is no language model of its own, says
so in ``NOT_BUILT``: none is left out without a reason.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from transformers import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

LAYERS = 4
_MOST_PARAMETERS = 4_000_000


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_SIZES: dict[str, Any] = {
    **_all("vocab_size vocab_size_per_layer_input decoder_vocab_size", 97),
    **_all(
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim "
        "input_embedding_size output_embedding_size attention_hidden_size lru_width "
        "hidden_size_global",
        32,
    ),
    **_all(
        "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim d_inner dim_ff dff "
        "feed_forward_size ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp "
        "dense_intermediate_size",
        48,
    ),
    **_all(
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks "
        "num_decoder_layers",
        LAYERS,
    ),
    **_all("encoder_layers num_encoder_layers", 1),
    **_all(
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "swa_num_attention_heads linear_num_value_heads linear_num_heads",
        4,
    ),
    **_all(
        "num_key_value_heads num_kv_heads swa_num_key_value_heads index_n_heads "
        "linear_num_key_heads",
        2,
    ),
    **_all(
        "max_position_embeddings n_positions max_seq_len n_ctx model_max_length context_length "
        "max_target_positions mamba_d_ssm",
        64,
    ),
    **_all(
        "head_dim dim_head d_head attention_head_size swa_head_dim qk_rope_head_dim "
        "qk_nope_head_dim v_head_dim o_lora_rank linear_key_head_dim linear_value_head_dim "
        "linear_head_dim index_topk mamba_d_state mamba_n_heads mamba_d_head mamba_chunk_size "
        "ssm_state_size mamba_num_heads mamba_head_dim state_size hidden_size_per_layer_input",
        8,
    ),
    **_all(
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size kv_lora_rank q_lora_rank qk_head_dim index_head_dim "
        "router_hidden_size",
        16,
    ),
    **_all("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_all("num_experts_per_tok num_experts_per_token moe_topk moe_k type_vocab_size", 2),
    **_all("n_group topk_group num_expert_group", 1),
    **_all("mamba_dt_rank time_step_rank laurel_rank rotary_dim", 4),
    "mamba_expand": 2,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_index": 90,
    "image_token_id": 90,
    "video_token_id": 91,
    "audio_token_id": 92,
}
_FOUR_KV = {"num_key_value_heads": 4}
_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_GEMMA4 = {"global_head_dim": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
_DOTS3 = {
    "layer_types": ["indexed_attention"] * 3 + ["sliding_attention"],
    "per_layer_config": {3: {"head_dim": 16}},
    "num_key_value_heads": 4,
    "head_dim": 16,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}
_MORE: dict[str, dict[str, Any]] = {
    **_all(
        "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa "
        "longcat_flash minicpm3 youtu",
        _FOUR_KV,
    ),
    **_all("hunyuan_v1_dense hunyuan_v1_moe ministral nemotron", _HEADS),
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "vocab_size": 260},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {**_FOUR_KV, "num_experts_per_tok": 2},
    "dots1": {
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "dots3_note_text": _DOTS3,
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_unified": {"text_config": _GEMMA4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": 97,
        "shape_vocab_size": 97,
    },
    "xlstm": {"hidden_size": 32, "embedding_dim": 32, "chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention"] * 2 + ["hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}

_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}

#: Families of which one more form is tried: the form's name, the family and what is set.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, is_decoder": ("bert", {"is_decoder": True}),
    "roberta, is_decoder": ("roberta", {"is_decoder": True}),
    "electra, is_decoder": ("electra", {"is_decoder": True}),
    "big_bird, is_decoder": ("big_bird", {"is_decoder": True}),
    "camembert, is_decoder": ("camembert", {"is_decoder": True}),
    "data2vec-text, is_decoder": ("data2vec-text", {"is_decoder": True}),
    "ernie, is_decoder": ("ernie", {"is_decoder": True}),
    "megatron-bert, is_decoder": ("megatron-bert", {"is_decoder": True}),
    "rembert, is_decoder": ("rembert", {"is_decoder": True}),
    "roberta-prelayernorm, is_decoder": ("roberta-prelayernorm", {"is_decoder": True}),
    "roc_bert, is_decoder": ("roc_bert", {"is_decoder": True}),
    "roformer, is_decoder": ("roformer", {"is_decoder": True}),
    "xlm-roberta, is_decoder": ("xlm-roberta", {"is_decoder": True}),
    "xlm-roberta-xl, is_decoder": ("xlm-roberta-xl", {"is_decoder": True}),
    "xmod, is_decoder": ("xmod", {"is_decoder": True}),
    "bert-generation, is_decoder": ("bert-generation", {"is_decoder": True}),
    "xlm, causal": ("xlm", {"causal": True}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon, two norms": ("falcon", {"new_decoder_architecture": True}),
    "opt, norm after": ("opt", {"do_layer_norm_before": False, "ffn_dim": 32}),
    "gemma4_text, experts": (
        "gemma4_text",
        {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "gemma4_text, no per-layer embeddings": ("gemma4_text", {"hidden_size_per_layer_input": 0}),
    "gemma4_text, both directions": ("gemma4_text", {"use_bidirectional_attention": "all"}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "jamba, attention last": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
}

_PART = "is a part of another model, and is not run alone"
NOT_BUILT: dict[str, str] = {
    "gemma3n": "has a vision tower that wants the timm package; gemma3n_text is its language model",
    "gemma4_assistant": _PART,
    "gemma4_unified_assistant": _PART,
    "musicgen": "is a model of sound; AutoModelForCausalLM does not read its config",
    "musicgen_melody": "is a model of sound; AutoModelForCausalLM does not read its config",
}

NAMES = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def tiny_config(cls: Any, more: dict[str, Any]) -> Any:
    """A config of ``cls`` with every known size made small, and ``more`` over it."""
    default, more = cls(), dict(more)
    have, taken = default.to_dict(), inspect.signature(cls).parameters
    options = {n: v for n, v in _SIZES.items() if n in taken and have.get(n) is not None}
    options["pad_token_id"] = 0
    for name in getattr(cls, "sub_configs_defaults", None) or getattr(cls, "sub_configs", {}):
        inner = getattr(default, name, None)
        if hasattr(inner, "model_type"):
            options[name] = tiny_config(type(inner), more.pop(name, {})).to_dict()
    for name, value in have.items():
        if isinstance(value, list) and name in taken and len(value) > LAYERS:
            options.update(_cut_list(name, value))
    return cls(**{**options, **more})


def _cut_list(name: str, value: list[Any]) -> dict[str, Any]:
    """A list by layer for as few layers; the last layer stays of the last kind."""
    if name == "num_attention_heads_per_layer":
        return {name: [4] * LAYERS}
    if name in ("moe_layers", "full_attn_idxs", "mlp_only_layers"):
        return {name: [i for i in value if i < LAYERS]}
    by_layer = ("_types", "_block_type", "layer_rope_theta", "activation_sparsity_pattern")
    if name.endswith((*by_layer, "no_rope_layers")):
        return {name: [*value[: LAYERS - 1], value[-1]]}
    return {}


def every(name: str, seed: int = 0) -> Any:
    """The tiny model of a family or variant, in eval mode with fresh weights of that seed."""
    family, more = VARIANTS.get(name, (name, {}))
    config = tiny_config(CONFIG_MAPPING[family], {**_MORE.get(family, {}), **more})
    build = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):  # a size that was missed would fill the memory
        count = sum(p.numel() for p in build(config, trust_remote_code=False).parameters())
    assert count <= _MOST_PARAMETERS, f"{name} is not tiny: {count:,} parameters"
    torch.manual_seed(seed)
    return build(config, trust_remote_code=False).eval()
