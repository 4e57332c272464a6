"""Models and tokenizers as they come from disk or a hub, and what identifies them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_SAMPLED_VALUES = 4096


def save_lm(path: str | Path, model: Any, tokenizer: Any) -> None:
    """Writes model and tokenizer as transformers does; ``load_lm`` or AutoModel read them."""
    with _quiet_bars():
        model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def load_lm(path: str | Path) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) from a folder that ``save_lm`` wrote, or a hub name.

    No remote code is run. FileNotFoundError where ``path`` reads like a folder and is none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir() and (isinstance(path, Path) or path.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"no language model at {path}: there is no such folder")
    source = str(folder if folder.is_dir() else path)
    _, transformers = libraries()
    with _quiet_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(source)


def tokenizer_hash(tokenizer: Any) -> str:
    """``sha256:...`` of a fast tokenizer's whole definition: vocabulary, merges, normalization."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"tokenizer must be a fast one, got {type(tokenizer).__name__}")
    return sha256(backend.to_str().encode())


def model_identity(model: nn.Module) -> tuple[str, str]:
    """(id, revision) of a model: its hub name or class, and its commit or a hash of its weights.

    The weights' hash covers names, shapes and up to 4,096 values of each parameter, which tells
    models of one family and checkpoints of one training apart without reading all of a large one.
    A path is not part of the identity: a model that is moved stays the same model.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return str(name), str(commit)
    digest = hashlib.sha256()
    for parameter_name, parameter in model.named_parameters():
        digest.update(f"{parameter_name} {tuple(parameter.shape)}".encode())
        digest.update(_sampled(parameter.detach()).numpy().tobytes())
    return type(model).__name__, f"weights:{digest.hexdigest()[:16]}"


def _sampled(parameter: Tensor) -> Tensor:
    flat = parameter.flatten()
    step = max(1, flat.numel() // _SAMPLED_VALUES)
    return flat[::step].float().cpu().contiguous()


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """No bars of transformers inside the block where stderr is no terminal; as before after it."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    if was_on and not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def libraries() -> tuple[Any, Any]:
    try:
        import tokenizers
        import transformers
    except ImportError as error:
        raise ImportError(
            'language models need transformers and tokenizers: pip install "knnext[lm]"'
        ) from error
    return tokenizers, transformers
