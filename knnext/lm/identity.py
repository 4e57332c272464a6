"""What tells two models, or two tokenizers, apart: their content, never what they call themselves.

A config may claim any name and commit; a model that was trained on, patched or pruned keeps them.
So a model is known by all bits of all its weights. They are summed where they lie, in words of
eight bytes with a factor each (odd, drawn once), as whole numbers that wrap: no single changed
value can keep a sum, any device and any order of adding gives the same one, and it takes about as
long as reading the weights once: a second for 135 million in float32 on one CPU core.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from knnext.lm.config_facts import state_facts
from knnext.lm.quantized import quantization_of
from knnext.lm.tensors import Load, named_tensors
from knnext.lm.wrapped import plain_model

_PREFIX = "tensors:"
#: Where ``load_lm`` notes what the weights alone do not tell.
_NOTE = "knnext_origin"
#: The forms that earlier versions recorded: hashes of samples, and commits as configs claim them.
_SAMPLED_PREFIX = "weights:"
_SAMPLED_VALUES = 4096
#: Words summed at once, so that a large matrix needs little memory beside itself.
_PIECE = 1 << 18
_WORD = 8  # bytes


def model_identity(model: nn.Module, recorded: str | None = None) -> tuple[str, str]:
    """(id, revision) of a model: its hub name or class for people, and a hash of its weights.

    The revision covers names, shapes, dtypes and every bit of all parameters and of the buffers
    that are saved with them. A path is no part of it: a model that is moved stays the same model.
    Nor is a commit that its config claims: a copy trained further is another model.

    ``recorded``: the revision in a datastore; one of an older knnext is answered in its own form
    (a hash of sampled values, or the claimed commit).
    """
    model = plain_model(model)
    config: Any = getattr(model, "config", None)
    commit = getattr(config, "_commit_hash", None)
    name = getattr(config, "_name_or_path", "") if commit else ""
    label = str(name or type(model).__name__)
    if recorded is None or recorded.startswith(_PREFIX):
        return label, _PREFIX + _hash(model)
    if recorded.startswith(_SAMPLED_PREFIX):
        return label, _SAMPLED_PREFIX + _sampled_hash(model)
    return label, str(commit) if commit else _PREFIX + _hash(model)


def model_parts(model: nn.Module) -> dict[str, str]:
    """What the states of a model depend on, part by part, to say in which two models differ.

    ``dtype`` of the weights that are not packed, the hash ``weights`` of all, and where there is
    one ``adapter`` (a hash of a PEFT adapter's own weights and scale, or "merged " and that),
    ``quantization`` ("GGUF Q4_1", "bitsandbytes 8bit"), ``commit``, which a hub's config claims,
    and ``config``: what of it bears on the states (knnext/lm/config_facts.py).
    """
    model = plain_model(model)
    config: Any = getattr(model, "config", None)
    base, adapter = _split(model)
    parts = {"dtype": _dtype(model), "weights": _hash_of(base)}
    if adapter:
        parts["adapter"] = _hash_of(adapter, _scales(model))
    quantized = quantization_of(model)
    if quantized is not None:
        parts["quantization"] = quantized
    facts = state_facts(config)
    if facts:
        parts["config"] = facts
    commit = getattr(config, "_commit_hash", None)
    if commit:
        parts["commit"] = str(commit)
    return parts | getattr(model, _NOTE, {})


def _dtype(model: nn.Module) -> str:
    """That of most bytes in parameters of floating point, as they were loaded."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            name = str(parameter.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + parameter.numel() * parameter.dtype.itemsize
    return max(sizes, key=lambda name: sizes[name], default="none")


def note_origin(model: nn.Module, facts: dict[str, str]) -> None:
    """Keep with the model what ``model_parts`` cannot see in it."""
    object.__setattr__(plain_model(model), _NOTE, dict(facts))


def tokenizer_hash(tokenizer: Any, recorded: str | None = None) -> str:
    """``sha256:...`` of a fast tokenizer's whole definition: vocabulary, merges, normalization.

    That is without what the latest call of it padded or cut, which it keeps in the definition.
    ``recorded``: the hash in a datastore; one that an older knnext took with these is answered so.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"tokenizer must be a fast one, got {type(tokenizer).__name__}")
    text = backend.to_str()
    whole = sha256(text.encode())
    return whole if whole == recorded else sha256(_without_calls(text).encode())


def _without_calls(definition: str) -> str:
    """The JSON with null for what a call sets; both stand at its head, before any token."""
    for name in ("truncation", "padding"):
        head = f'"{name}":'
        start = definition.find(head) + len(head)
        if start >= len(head):
            _, end = json.JSONDecoder().raw_decode(definition, start)
            definition = f"{definition[:start]}null{definition[end:]}"
    return definition


def sha256(content: bytes) -> str:
    """``sha256:`` and 64 hexadecimal digits."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _hash(model: nn.Module) -> str:
    base, adapter = _split(model)
    if not adapter:
        return _hash_of(base)
    both = f"{_hash_of(base)} {_hash_of(adapter, _scales(model))}"
    return hashlib.sha256(both.encode()).hexdigest()[:32]


def _hash_of(tensors: list[tuple[str, Load]], *more: str) -> str:
    digest = hashlib.sha256()
    factors: dict[torch.device, Tensor] = {}
    for name, load in tensors:
        tensor = load()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.device not in factors:
            factors[tensor.device] = _factors().to(tensor.device)
        digest.update(_sums(tensor, factors[tensor.device]).numpy().tobytes())
    for text in more:
        digest.update(text.encode())
    return digest.hexdigest()[:32]


def _split(model: nn.Module) -> tuple[list[tuple[str, Load]], list[tuple[str, Load]]]:
    """Names and tensors of the model, and of peft's adapters in it.

    The first are named as they are without an adapter, so that its base model is known again.
    """
    own = {n for module in model.modules() for n in _adapter_names(module)}
    if not own:
        return list(named_tensors(model)), []
    own |= {"modules_to_save"}
    base, adapter = [], []
    for name, tensor in named_tensors(model):
        parts = name.removeprefix("base_model.model.").split(".")
        if own & set(parts):
            adapter.append((".".join(parts), tensor))
        else:
            plain = [part for part in parts if part not in ("base_layer", "original_module")]
            base.append((".".join(plain), tensor))
    return sorted(base, key=lambda item: item[0]), adapter


def _adapter_names(module: nn.Module) -> tuple[str, ...]:
    """What peft calls the parts that an adapter has in this layer, or shares with others."""
    own = tuple(getattr(module, "adapter_layer_names", ()))
    return own + tuple(getattr(module, "other_param_names", ())) if own else ()


def _scales(model: nn.Module) -> str:
    """Which adapters act, of which layers, and how strongly: no tensor says it."""
    lines = []
    for name, module in model.named_modules():
        if not getattr(module, "adapter_layer_names", ()):
            continue
        scaling = getattr(module, "scaling", None) or {}
        active = [str(a) for a in getattr(module, "active_adapters", ())]
        scales = [f"{a}={float(scaling[a])!r}" if a in scaling else a for a in active]
        off = "off" if getattr(module, "disable_adapters", False) else ""
        lines.append(
            f"{name.removeprefix('base_model.model.')} {type(module).__name__} {scales} {off}"
        )
    return "\n".join(lines)


def _factors() -> Tensor:
    """Odd numbers that look drawn: splitmix64's, by arithmetic that no release can change."""
    mixed = np.arange(1, _PIECE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed | np.uint64(1)).view(np.int64))


def _sums(tensor: Tensor, factors: Tensor) -> Tensor:
    """(pieces,) int64 on the CPU: the weighted sum of each piece's words of eight bytes."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    content = tensor.reshape(-1).view(torch.uint8)
    rest = content.numel() % _WORD
    tail = torch.zeros(_WORD, dtype=torch.uint8, device=content.device)
    tail[:rest] = content[content.numel() - rest :]
    body = content[: content.numel() - rest]
    if body.storage_offset() % _WORD:
        body = body.clone()
    pieces = (*body.view(torch.int64).split(_PIECE), tail.view(torch.int64))
    return torch.stack([(words * factors[: len(words)]).sum() for words in pieces]).cpu()


def _sampled_hash(model: nn.Module) -> str:
    """As knnext 0.1 wrote it: up to 4,096 values of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)]
        digest.update(sampled.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
