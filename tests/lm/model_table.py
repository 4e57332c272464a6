"""Writes docs/models.md: every causal LM of the installed transformers, and its `att`.

    python -m tests.lm.model_table

A row is made from a tiny model with fresh weights. "Verified" lists what held for the module, also
with another seed and with all matrices a hundredth of their size; the words are those of `CHECKS`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from knnext.lm.causal import NotCausalError, check_causal
from knnext.lm.feed_forward import FeedForward, find_feed_forward
from knnext.lm.positions import Place, dependence
from knnext.lm.running import TRACE_LENGTH, evaluating, trace_inputs
from tests.lm.every_model import NAMES, NOT_BUILT, every

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
#: What the table's letters mean.
CHECKS = {
    "n": "it reads what a norm of its block gives (named beside it), and nothing else",
    "p": "its own output at a position depends on its input there and on no other position",
    "b": "so does its block's output on what it reads: nothing after it mixes positions",
    "s": "another seed, and matrices of a hundredth of the size, give the same module",
}


@dataclass(frozen=True)
class Row:
    name: str
    architecture: str
    module: str = ""
    norm: str = ""
    verified: str = ""
    refused: str = ""

    def __str__(self) -> str:
        if self.refused:
            return f"| {self.name} | {self.architecture} | refused: {self.refused} | | |"
        reads = f"`{self.norm}`" if self.norm else "no norm"
        return (
            f"| {self.name} | {self.architecture} | `{self.module}` | {reads} | {self.verified} |"
        )


def row(name: str) -> Row:
    """The table's row of one family or variant."""
    if name in NOT_BUILT:
        return Row(name, "", refused=f"not tried: it {NOT_BUILT[name]}")
    model = every(name)
    architecture = type(model).__name__
    try:
        check_causal(model)
    except NotCausalError:
        return Row(name, architecture, refused="it sees the future")
    except ValueError:
        return Row(name, architecture, refused="it has several states for each token")
    try:
        found = find_feed_forward(model)
    except ValueError:
        return Row(name, architecture, refused="no feed-forward in the last block (`ffn` works)")
    return Row(name, architecture, found.name, found.norm, _verified(name, model, found))


def _verified(name: str, model: Any, found: FeedForward) -> str:
    block = found.name
    while not block.rsplit(".", 1)[-1].isdigit():
        block = block.rpartition(".")[0]
    held = {
        "n": bool(found.norm),
        "p": _alone(model, found.module, found.module),
        "b": _alone(model, found.module, model.get_submodule(block)),
        "s": find_feed_forward(_shrunk(every(name, seed=1))).name == found.name,
    }
    return "".join(letter for letter in CHECKS if held[letter])


def _alone(model: Any, inner: Any, outer: Any) -> bool:
    """Asked here of the last call of both, apart from the finder's own tracing."""
    calls: list[Any] = []
    handles = [m.register_forward_pre_hook(lambda m, _: calls.append(m)) for m in (inner, outer)]
    with evaluating(model):
        model(**trace_inputs(model))
        for handle in handles:
            handle.remove()
        counts = [
            sum(c is m for c in calls) // (2 if inner is outer else 1) for m in (inner, outer)
        ]
        slopes = dependence(
            lambda m: m(**trace_inputs(m)),
            model,
            Place(inner, "input", counts[0] - 1),
            Place(outer, "output", counts[1] - 1),
            slice(-1, None),
            TRACE_LENGTH,
        )
    return slopes is not None and bool(slopes[-1] > 0) and not bool(slopes[:-1].any())


def _shrunk(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.01)
    return model


def table() -> str:
    import transformers

    rows = [row(name) for name in NAMES]
    good = sum(not r.refused for r in rows)
    letters = "\n".join(f"- **{letter}**: {text}." for letter, text in CHECKS.items())
    return f"""# Which models, and which module is `att`

`python -m tests.lm.model_table` writes this page: every causal language model that transformers
{transformers.__version__} knows, as a tiny model with fresh weights. `att` is found by what the
modules do ([concepts](concepts.md)), and is named for {good} of the {len(rows)} rows; the others
are refused with a reason. `ffn` is what the output layer reads, in all of them.

Verified, by derivatives that are exactly 0 or are not:

{letters}

No **n**: the block has no norm there (OLMo 2), or makes what it reads from several streams. No
**b**: a convolution or a Mamba layer follows in the block (Inkling, Zamba); or the model has no
derivatives in eval mode (Reformer, xLSTM), and small changes of the input were made in their place.

| family | architecture | `att` reads | given by | verified |
|---|---|---|---|---|
""" + "".join(f"{r}\n" for r in rows)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    DOCS.write_text(table(), encoding="utf-8")
