"""How much text a model reads at once: what its device has the memory for, and what may lie side by
side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from knnext.lm.running import input_device, num_known_tokens

#: Tokens a pass. More bring a CPU nothing, and keep a GPU busy between two passes.
_TOKENS = {"cpu": 8192, "cuda": 32_768}
_SHARE = 0.25  # of the free memory, for what a pass holds
_MEMINFO = Path("/proc/meminfo")
_WIDTH_NAMES = ("hidden_size", "n_embd", "d_model")
_INNER_NAMES = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")
_LAYER_NAMES = ("num_hidden_layers", "n_layer", "num_layers")
_HEAD_NAMES = ("num_attention_heads", "n_head", "num_heads")
#: Kinds of rotary embedding of which the frequencies depend on how long the text is.
_LENGTH_ROPES = ("dynamic", "longrope")


def choose_batch_size(model: nn.Module, block_size: int, *, logits: bool = False) -> int:
    """Windows of ``block_size`` tokens that are read at once, where nobody says how many.

    ``logits``: whether the output layer is run too, on all of them in some models.
    """
    device = input_device(model)
    tokens = _TOKENS.get(device.type, _TOKENS["cpu"])
    free = free_memory(device)
    if free is not None:
        tokens = min(tokens, int(free * _SHARE) // token_bytes(model, block_size))
    return max(1, tokens // block_size)


def token_bytes(model: nn.Module, block_size: int, *, logits: bool = False) -> int:
    """About what a pass holds for each token: a state of every layer, and one layer's work."""
    config: Any = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    config = config if get is None else get()
    width = _first(config, _WIDTH_NAMES) or 1024
    inner = _first(config, _INNER_NAMES) or 4 * width
    layers = _first(config, _LAYER_NAMES) or 1
    numbers = width * (layers + 12) + 3 * inner
    if getattr(config, "_attn_implementation", None) == "eager":
        numbers += 3 * block_size * (_first(config, _HEAD_NAMES) or 1)  # every pair of tokens
    itemsize = max(2, next(model.parameters()).element_size())
    of_words = num_known_tokens(model) * (itemsize + 4) if logits else 0
    return numbers * itemsize + of_words


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free there, or None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = _MEMINFO.read_text(encoding="ascii")
        return 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):  # no Linux
        return None


def length_matters(model: nn.Module, block_size: int) -> bool:
    """Whether a state depends on how far its row is filled up, though the model is causal.

    Some rotary embeddings (Phi-3's long context, dynamic NTK) turn at another speed as soon as a
    row is longer than what the model was first trained on. Where attention picks some tokens out of
    a row (DeepSeek 3.2 and its kin, Reformer), what fills it up takes a place among those picked.
    """
    config: Any = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    config = config if get is None else get()
    picked = _first(config, ("index_topk", "lsh_attn_chunk_length"))
    if picked is not None and block_size > picked:
        return True
    trained = _first(config, ("original_max_position_embeddings", "max_position_embeddings"))
    for rope in _ropes(config):
        if (rope.get("rope_type") or rope.get("type")) in _LENGTH_ROPES:
            most = rope.get("original_max_position_embeddings") or trained
            if not most or block_size > most:
                return True
    return False


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary embeddings that a config speaks of: one, or one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, Mapping):
            yield found
            yield from (part for part in found.values() if isinstance(part, Mapping))


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and n > 0), None)
