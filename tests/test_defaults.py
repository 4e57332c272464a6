"""torch's default dtype and device are set by others: nothing here may lean on them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "knnext"

#: Whole numbers, or the dtype of what is given, whatever the default is.
KEEPING = {"arange", "randperm", "randint", "as_tensor", "asarray"}
MAKERS = KEEPING | {
    *("empty", "zeros", "ones", "full", "eye", "linspace", "logspace", "rand", "randn"),
    *("tensor", "scalar_tensor", "normal", "tril_indices", "triu_indices"),
}


def unnamed(source: str) -> list[str]:
    """Each tensor that is made without its device or dtype: line and what is missing."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = node.func.value, node.func.attr
        if not (isinstance(owner, ast.Name) and owner.id == "torch" and name in MAKERS):
            continue
        given = {keyword.arg for keyword in node.keywords}
        wanted = {"device"} if name in KEEPING else {"device", "dtype"}
        if missing := sorted(wanted - given):
            found.append(f"line {node.lineno}: torch.{name} without {', '.join(missing)}")
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_every_tensor_names_its_dtype_and_device(path: Path) -> None:
    assert not unnamed(path.read_text(encoding="utf-8"))


def test_a_planted_one_is_seen() -> None:
    source = "import torch\ntorch.zeros(3)\ntorch.arange(4, device=d)\nx.new_zeros(2)\n"
    assert unnamed(source) == ["line 2: torch.zeros without device, dtype"]
