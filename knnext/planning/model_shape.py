"""How large a language model is, from its configuration alone: no weights are read.

transformers makes the model without memory (torch's meta device), so that its parameters are
counted by the code that would run them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnext.errors import MissingFileError

_INSTEAD = "or describe the model by --dim, --layers and --params"


@dataclass(frozen=True)
class ModelShape:
    """What a forward pass for keys costs.

    Attributes:
        name: for people.
        dim: width of a key.
        layers: blocks with attention.
        params: numbers of the whole model, as they lie in memory.
        active: of these, what one token is multiplied with on the way to its key: without
            embeddings and output layer, and of experts those that are chosen.
        attention: width of all heads together.
        context: tokens that the model reads at once, or None.
    """

    name: str
    dim: int
    layers: int
    params: float
    active: float
    attention: int
    context: int | None = None

    def flops(self, block: int) -> float:
        """Operations of one token in a window of ``block``, half of which it sees on average."""
        return 2 * self.active + 2 * self.layers * self.attention * block


def described(dim: int, layers: int | None, params: float | None) -> ModelShape:
    """A model of so many layers and parameters; a common one of that width where they are left out.

    A block of four times the width has 12 dim^2 numbers.
    """
    block = 12 * dim**2
    if layers is None:
        layers = 12 if params is None else max(1, round(params / block))
    active = float(layers * block if params is None else params)
    return ModelShape(f"a model of {active:.3g} parameters", dim, layers, active, active, dim)


def read_shape(model: str, key_layer: str = "att", revision: str | None = None) -> ModelShape:
    """Of a folder with a config.json, or a hub name.

    Raises:
        FileNotFoundError, OSError: there is none, or the hub cannot be reached and has left nothing
            in the cache.
        ValueError: it is no causal language model that transformers knows.
    """
    import torch

    from knnext.lm.load import libraries

    _, transformers = libraries()
    config = _config(transformers, model, revision)
    try:
        with torch.device("meta"):
            made = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a model's code raises
        raise ValueError(
            f"{model}: its configuration makes no causal language model here: {_line(error)}; "
            f"{_INSTEAD}"
        ) from error
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    head_dim = getattr(text, "head_dim", None) or (width // heads if heads else 0)
    apart = _apart(made)
    total = sum(p.numel() for p in made.parameters())
    active = sum(
        p.numel() * _chosen(name, text) for name, p in made.named_parameters() if id(p) not in apart
    )
    return ModelShape(
        name=model,
        dim=_key_width(made, key_layer, width),
        layers=int(text.num_hidden_layers),
        params=float(total),
        active=float(active),
        attention=heads * int(head_dim) or width,
        context=_context(text),
    )


def _config(transformers: Any, model: str, revision: str | None) -> Any:
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MissingFileError(f"{model} has no config.json, {_INSTEAD}")
        source = str(folder)
    elif model.startswith((".", "/", "~")):
        raise MissingFileError(f"no language model at {model}: there is no such folder")
    else:
        source = model
    options = {} if revision is None else {"revision": revision}
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # of the hub, of a network, of a format
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"the configuration of {model} cannot be read: {_line(error)}; give a folder that "
            f"holds its config.json, {_INSTEAD}"
        ) from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def _apart(model: Any) -> set[int]:
    """Parameters that no token is multiplied with on the way to its key."""
    found = set()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            found |= {id(p) for p in module.parameters()}
    return found


def _chosen(name: str, config: Any) -> float:
    """Of a parameter of experts, the share that a token meets."""
    if ".experts." not in name:
        return 1.0
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = next((n for key in names if (n := getattr(config, key, None))), None)
    active = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
    return float(active / experts) if experts and active else 1.0


def _key_width(model: Any, key_layer: str, hidden: int) -> int:
    if key_layer == "att":
        return hidden
    if key_layer == "ffn":
        head = model.get_output_embeddings()
        return hidden if head is None else int(next(head.parameters()).shape[-1])
    _, _, rest = key_layer.partition(":")
    name, _, side = rest.rpartition(":")
    modules = dict(model.named_modules())
    if (
        not key_layer.startswith("module:")
        or side not in ("input", "output")
        or name not in modules
    ):
        raise ValueError(
            f"--key-layer must be att, ffn or module:NAME:input|output of the model, got "
            f"{key_layer!r}"
        )
    width = getattr(modules[name], "in_features" if side == "input" else "out_features", None)
    return hidden if width is None else int(width)


def _context(config: Any) -> int | None:
    from knnext.lm.running import context_length

    class _Model:
        pass

    model = _Model()
    model.config = config  # type: ignore[attr-defined]
    return context_length(model)  # type: ignore[arg-type]
