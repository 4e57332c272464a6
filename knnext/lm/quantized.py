"""Models in fewer bits: made so as they are loaded, or told to be so.

``8bit`` and ``4bit`` are bitsandbytes' (LLM.int8() and NF4); ``torchao:...`` are torchao's, by the
short names that it has for them. All run on the CPU too.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import Tensor, nn

from knnext.errors import ModelError, missing_package
from knnext.lm.tensors import leaves

#: What ``quantization`` may be. "torchao" alone is its weights in eight bits.
QUANTIZATIONS = ("8bit", "4bit", "torchao:int8wo", "torchao:int8dq", "torchao:float8wo")
_TORCHAO = {
    "int8wo": "Int8WeightOnlyConfig",
    "int8dq": "Int8DynamicActivationInt8WeightConfig",
    "float8wo": "Float8WeightOnlyConfig",
}
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_quantization(quantization: Any) -> str:
    """The name of a quantization, or "given" of a config object of transformers.

    ValueError for other names, ImportError that says what to install.
    """
    if hasattr(quantization, "quant_method"):
        return "given"
    name = {"torchao": "torchao:int8wo"}.get(quantization, quantization)
    if name not in QUANTIZATIONS:
        raise ValueError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)}, or a quantization config of "
            f"transformers; got {quantization!r}"
        )
    wanted = "torchao" if name.startswith("torchao") else "bitsandbytes"
    for package in (wanted, "accelerate"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise missing_package(f"quantization {name} needs", package, wanted) from error
    return str(name)


def quantization_config(name: str, dtype: Any) -> Any:
    """The config of transformers; ``dtype`` is that in which four bits are multiplied."""
    import transformers

    if name.startswith("torchao"):
        kinds = importlib.import_module("torchao.quantization")
        return transformers.TorchAoConfig(getattr(kinds, _TORCHAO[name.partition(":")[2]])())
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_no_word_of_a_cast)
    if name == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def _no_word_of_a_cast(record: logging.LogRecord) -> bool:
    """bitsandbytes tells at each product of each layer that it casts to float16."""
    return "inputs will be cast from" not in record.getMessage()


def check_was_quantized(model: nn.Module, quantization: Any, source: str) -> None:
    """ModelError where nothing was: torchao says nothing where no layer is an nn.Linear."""
    if not is_quantized(model):
        kinds = sorted({type(m).__name__ for m in model.modules() if _is_layer(m)})
        raise ModelError(
            f"quantization {quantization} changed nothing in {source}: it knows no layers such as "
            f"its {', '.join(kinds) or 'own'}. Try 8bit or 4bit, or load it without"
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer's weight is packed, in whatever way."""
    return any(_is_packed(module) for module in model.modules())


def quantization_of(model: nn.Module) -> str | None:
    """Which quantization a model says that it has, or its weights show; None: none is seen."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None:
        return _named(config)
    kinds = {type(m.weight).__name__ for m in model.modules() if _is_packed(m) and _has_weight(m)}
    if kinds:
        return ", ".join(sorted(kinds))
    kinds = {type(m).__module__ for m in model.modules() if _is_packed(m)}
    return ", ".join(sorted(kinds)) or None


def _named(config: Any) -> str:
    """Such as "bitsandbytes 4bit nf4", "torchao Int8WeightOnlyConfig", "gptq 4bit"."""
    values = config if isinstance(config, dict) else config.to_dict()
    method = values.get("quant_method", "unknown")
    words = [str(getattr(method, "value", method))]
    if values.get("load_in_8bit") or values.get("_load_in_8bit"):
        words.append("8bit")
    elif values.get("load_in_4bit") or values.get("_load_in_4bit"):
        words += ["4bit", str(values.get("bnb_4bit_quant_type", ""))]
    elif isinstance(values.get("bits"), int):
        words.append(f"{values['bits']}bit")
    kind: Any = values.get("quant_type")
    if isinstance(kind, dict):
        kind = kind.get("default", kind)
        kind = kind.get("_type", "") if isinstance(kind, dict) else kind
    if kind is not None:
        words.append(str(kind))
    return " ".join(word for word in words if word)


def _is_layer(module: nn.Module) -> bool:
    own = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
    return bool(own) and not isinstance(module, nn.Embedding)


def _has_weight(module: Any) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def _is_packed(module: Any) -> bool:
    if not isinstance(getattr(module, "out_features", None), int):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return any(leaf.dtype not in _PLAIN for _, leaf in leaves(weight))
    return callable(weight) or hasattr(module, "qweight")
