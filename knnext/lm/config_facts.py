"""What of a model's config bears on its states, besides the weights: the same ones give others by
another rotary scaling, window, soft cap, number of heads or epsilon.

Values are kept by name and not as one hash: two that are compared may come from two versions of
transformers, of which one knows a setting that the other does not. Only what both have counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

#: Of training, of losses, of what comes out beside the states, of token ids that people set.
_APART = (
    "summary",
    "dropout",
    "pdrop",
    "drop_rate",
    "layerdrop",
    "initializer",
    "init_std",
    "token_id",
)
_NO_MATTER = {
    "architectures", "attn_implementation", "auto_map", "dtype", "torch_dtype", "id2label",
    "label2id", "num_labels", "name_or_path", "output_attentions", "output_hidden_states",
    "output_router_logits", "problem_type", "pruned_heads", "quantization_config", "return_dict",
    "router_aux_loss_coef", "router_jitter_noise", "task_specific_params", "tie_word_embeddings",
    "tokenizer_class", "transformers_version", "use_cache", "chunk_size_feed_forward",
    "gradient_checkpointing", "pretraining_tp", "keys_to_ignore_at_inference", "vocab_size",
    "max_position_embeddings", "n_positions", "n_ctx", "generation_config", "bos_token",
}  # fmt: skip


def state_facts(config: Any) -> str:
    """JSON of the values that bear on states, by name; "" where there is no config."""
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = _kept(values)
    return json.dumps(kept, sort_keys=True, separators=(",", ":")) if kept else ""


def _kept(values: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        named = str(name)
        if named.startswith("_") or named in _NO_MATTER or any(part in named for part in _APART):
            continue
        if isinstance(value, dict):
            value = _kept(value)
        if _is_plain(value):
            found[named] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool))


def settings_differences(
    stored: Mapping[str, str] | None, asked: Mapping[str, str] | None
) -> list[str]:
    """In what two models differ that have the same weights: what both tell, and tell otherwise."""
    found = []
    if stored and asked:
        old, new = stored.get("quantization", ""), asked.get("quantization", "")
        if not (old.startswith(new) or new.startswith(old)):  # an earlier knnext said less
            found.append(f"the models differ in quantization: datastore has {old}, asked for {new}")
        found += [
            f"the models differ in config: datastore has {name} {a}, asked for {b}"
            for name, a, b in _settings_apart(_config_of(stored), _config_of(asked))
        ]
    return found


def _config_of(side: Mapping[str, str]) -> Mapping[str, Any]:
    """Nothing, where it is not said, or in a way that no build says it."""
    try:
        found = json.loads(side.get("config") or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _settings_apart(
    stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """(name, stored, asked) of settings that both have, with other values."""
    for name in sorted(stored.keys() & asked.keys()):
        a, b = stored[name], asked[name]
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _settings_apart(a, b, f"{prefix}{name}.")
        elif a != b:
            yield f"{prefix}{name}", json.dumps(a), json.dumps(b)
