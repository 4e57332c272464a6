"""Adapters of PEFT (LoRA and the like) on a model: whole, of this model, and no virtual tokens."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from knnext.errors import MissingFileError, ModelError, missing_package
from knnext.lm.model_folder import read_json
from knnext.lm.wrapped import virtual_tokens


def check_adapter(adapter: str | Path) -> str:
    """What peft is given. MissingFileError or ModelError where a folder holds no adapter."""
    _peft()
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        if isinstance(adapter, Path) or adapter.startswith((".", "/", "~")):
            raise MissingFileError(f"no adapter at {adapter}: there is no such folder")
        return str(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise MissingFileError(f"no adapter in {folder}: adapter_config.json is missing")
    read_json(folder / "adapter_config.json")
    if not any((folder / f"adapter_model.{end}").is_file() for end in ("safetensors", "bin")):
        raise MissingFileError(f"no adapter in {folder}: adapter_model.safetensors is missing")
    return str(folder)


def check_adapter_kind(source: str) -> None:
    """ModelError for an adapter of virtual tokens: they are states that no token of a text made."""
    config = _peft().PeftConfig.from_pretrained(source, trust_remote_code=False)
    if config.is_prompt_learning:
        kind = getattr(config.peft_type, "value", "unknown")
        raise ModelError(virtual_tokens(f"the adapter {source}", kind))


def with_adapter(model: nn.Module, source: str) -> Any:
    """peft's wrapper of the model, with the adapter in its layers.

    ModelError where the adapter lacks weights, or has others than fit the model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        # peft only warns, and leaves a layer as if there were no adapter.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            return _peft().PeftModel.from_pretrained(
                model, source, is_trainable=False, trust_remote_code=False
            )
        except (Warning, RuntimeError, ValueError, KeyError) as error:
            line = " ".join(str(error).split())[:300]
            raise ModelError(f"the adapter {source} does not fit the model: {line}") from error


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise missing_package("adapters need", "peft", "peft") from error
    return peft
