"""Where a model's keys come from: finding the module, and reading it during a forward pass.

Two layers have names (h_ds in the paper):

* ``"att"``: what the last block's feed-forward reads, after its norm, without the residual;
* ``"ffn"``: what the output layer reads, after the model's final norm where it has one.

``"ffn"`` is the input of ``model.get_output_embeddings()``. ``"att"`` has no accessor, and models
name and arrange their blocks in many ways, so it is found by watching a short forward pass
(knnext/lm/feed_forward.py). Anything else is named by hand: ``"module:NAME:input"`` or
``"module:NAME:output"`` with a name out of ``model.named_modules()``. Keys of several layers side
by side, from one run of the model, are named with ``+``: ``"att+ffn"`` (``find_key_modules``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from knnext.lm.causal import check_causal
from knnext.lm.compiled import uncompiled
from knnext.lm.feed_forward import find_feed_forward
from knnext.lm.running import first_tensor, here
from knnext.lm.wrapped import plain_model, plain_name

KEY_LAYERS = ("att", "ffn")
_WANTED = "'att', 'ffn' or 'module:NAME:input' / 'module:NAME:output'"


@dataclass(frozen=True)
class KeyModule:
    """A module of one model, and which side of it is the key."""

    name: str
    module: nn.Module
    side: Literal["input", "output"]

    def __str__(self) -> str:
        return f"module:{self.name}:{self.side}"


class CapturedStates:
    """What the key module read or gave in the latest forward pass."""

    def __init__(self, key: KeyModule) -> None:
        self.key = key
        self._states: Tensor | None = None

    def clear(self) -> None:
        self._states = None

    def states(self, batch: int) -> Tensor:
        """The states as (batch, length, D), detached, as the model made them.

        Some blocks flatten their rows before the feed-forward; they are folded back here.
        RuntimeError where the module did not run.
        """
        if self._states is None:
            raise RuntimeError(f"{self.key} did not run in this forward pass")
        return self._states.reshape(batch, -1, self._states.shape[-1])

    def _keep(self, tensor: Tensor | None) -> None:
        if tensor is None:
            raise RuntimeError(f"{self.key} has no tensor on its {self.key.side} side")
        self._states = tensor.detach()


def find_key_module(model: nn.Module, key_layer: str | KeyModule) -> KeyModule:
    """The module behind ``key_layer``.

    ValueError for an unknown layer or module, or where the structure gives no answer; the message
    then lists the modules of the last block and how to name one. ValueError also for a model that
    sees the future (knnext/lm/causal.py), or has virtual tokens: all that reads keys passes here
    first. Names are those of the model inside peft's and torch.compile's wrappers.
    """
    if isinstance(key_layer, KeyModule):
        return key_layer
    known = isinstance(key_layer, str) and key_layer in KEY_LAYERS
    if isinstance(key_layer, str) and "+" in key_layer:
        raise ValueError(
            f"key_layer {key_layer!r} joins several layers, which is for states in bulk (`knnext "
            "build`, `tune`, `eval`): a KNNLM, `generate`, `serve` and hooks read one. Build a "
            "datastore of one of them"
        )
    if not known and not (isinstance(key_layer, str) and key_layer.startswith("module:")):
        raise ValueError(f"key_layer must be {_WANTED}, got {key_layer!r}")
    plain = plain_model(model)
    with uncompiled(plain):
        check_causal(plain)
        if key_layer == "att":
            found = find_feed_forward(plain)
            return KeyModule(plain_name(found.name), found.module, "input")
    return _output_layer(plain) if key_layer == "ffn" else _named_module(model, key_layer)


def find_key_modules(model: nn.Module, key_layer: str | KeyModule) -> tuple[KeyModule, ...]:
    """The modules behind ``key_layer``, which may join several with ``+``, in that order.

    Their states stand side by side in one key, whose width is the sum of theirs. ValueError for a
    layer that is named twice; see ``find_key_module``, which knows of one layer only, for others.
    """
    if isinstance(key_layer, KeyModule):
        return (key_layer,)
    layers = key_layer.split("+") if isinstance(key_layer, str) else [key_layer]
    if len(set(layers)) < len(layers):
        raise ValueError(f"key_layer names a layer twice: {key_layer!r}")
    return tuple(find_key_module(model, layer) for layer in layers)


def _output_layer(model: nn.Module) -> KeyModule:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    for name, module in model.named_modules():
        if head is not None and module is head:
            return KeyModule(plain_name(name), module, "input")
    raise ValueError(
        f"{type(model).__name__} has no output layer (get_output_embeddings() gives none): load it "
        "as a causal LM, or name a module as key_layer='module:NAME:input'"
    )


def _named_module(model: nn.Module, key_layer: str) -> KeyModule:
    _, _, rest = key_layer.partition(":")
    name, _, side = rest.rpartition(":")
    if side not in ("input", "output"):
        raise ValueError(f"key_layer must be {_WANTED}, got {key_layer!r}")
    plain = plain_model(model)
    modules = {plain_name(n): module for n, module in plain.named_modules()}
    if name and name not in modules:  # as it is called in a wrapper
        modules |= {plain_name(n): module for n, module in model.named_modules()}
    if not name or name not in modules:
        tail = name.rsplit(".", 1)[-1]
        near = [n for n in modules if n and n.rsplit(".", 1)[-1] == tail][-3:]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"{type(plain).__name__} has no module named {name!r}{hint}")
    return KeyModule(name, modules[name], "input" if side == "input" else "output")


@contextmanager
def capture_hidden_states(model: nn.Module, key_layer: str | KeyModule) -> Iterator[CapturedStates]:
    """Reads the keys of this thread's passes inside the block, with a hook that ends with it.

    Yields an object whose ``states(batch)`` gives the latest pass's keys. A module that runs more
    than once in a pass (looped models) is read the last time.
    """
    key = find_key_module(model, key_layer)
    captured = CapturedStates(key)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured._keep(first_tensor((args, kwargs)))

    def after(_: nn.Module, args: Any, output: Any) -> None:
        captured._keep(first_tensor(output))

    if key.side == "input":
        handle = key.module.register_forward_pre_hook(here(before), with_kwargs=True)
    else:
        handle = key.module.register_forward_hook(here(after))
    try:
        with uncompiled(model, key.module):
            yield captured
    finally:
        handle.remove()
