"""The compiled schemas, those kept in Python, and what runs where no library could be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import knnext
from knnext.ops._schemas import GRADIENT_NAMES, GRADIENT_SCHEMAS, NAMES, SCHEMAS
from tests.ops.mixing_cases import ROOT, run_python


def overload(name: str) -> torch._ops.OpOverload:
    base, _, tail = name.partition(".")
    return getattr(getattr(torch.ops.knnext, base), tail or "default")


@pytest.mark.parametrize("schema", (*SCHEMAS, *GRADIENT_SCHEMAS))
def test_the_compiled_schema_is_the_one_kept_in_python(schema: str) -> None:
    compiled = overload(schema.split("(")[0])._schema
    assert compiled == torch._C.parse_schema("knnext::" + schema)


def test_there_are_no_other_overloads() -> None:
    every = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("knnext::")]
    names = {n.removeprefix("knnext::") for n in every}
    assert names == {*NAMES, *GRADIENT_NAMES}


@pytest.mark.parametrize("name", ["knn_softmax", "knn_interpolate", "knn_target_log_prob"])
@pytest.mark.parametrize("form", ["{}", "_{}_gradients"])
def test_the_tensor_overload_comes_first(name: str, form: str) -> None:
    # torch tries them in this order, and a 0-dim tensor passes for a float.
    assert getattr(torch.ops.knnext, form.format(name)).overloads() == ["tensor", "default"]


FALLBACK = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import knnext
import torch
data = torch.load("cases.pt")
results, errors = [], []
for name, args in data:
    try:
        results.append(getattr(knnext, name)(*args))
    except RuntimeError as error:
        errors.append(str(error))
torch.save(results, "results.pt")
leaf = torch.tensor(2.0, requires_grad=True)
knnext.knn_softmax(data[0][1][0], data[0][1][1], leaf, 9)[:, 0].sum().backward()
print(json.dumps({
    "file": knnext.__file__,
    "warnings": [str(w.message) for w in caught if w.category.__name__ == "FallbackWarning"],
    "fallbacks": knnext.ops.REPORT.fallbacks, "errors": errors, "grad": leaf.grad.item(),
}))
"""


def cases() -> list[tuple[str, tuple]]:
    d, tokens = torch.rand(3, 6), torch.randint(-1, 9, (3, 6))
    x, targets, t = torch.randn(3, 9), torch.tensor([1, 2, -1]), torch.tensor([0.5, 1.0, 2.0])
    keys = torch.randn(30, 8)
    return [
        ("knn_softmax", (d, tokens, 0.5, 9)),
        ("knn_softmax", (d, tokens, t, 9)),
        ("knn_interpolate", (x, d, tokens, 0.5, 0.25)),
        ("knn_interpolate", (x, d, tokens, t, 1.0)),
        ("knn_target_log_prob", (d, tokens, targets, 0.5)),
        ("knn_target_log_prob", (d, tokens, targets, t)),
        ("knn_search", (keys[:4], keys, 5)),
        ("key_sqnorms", (keys,)),
        ("rescore", (keys[:2], keys, torch.tensor([[1, -1], [0, 3]]))),
        ("merge_topk", (d, tokens, 4)),
        # Refused, in the words of the compiled ops:
        ("knn_softmax", (d, tokens.clamp_min(9), 0.5, 9)),
        ("knn_softmax", (d, tokens, t - 1, 9)),
        ("knn_softmax", (d, tokens, -1.0, 9)),
        ("knn_interpolate", (x, d, tokens, t, torch.tensor(1.5))),
        ("knn_target_log_prob", (d, tokens - 1, targets, 0.5)),
    ]


def test_without_the_library_the_answers_are_the_same_after_one_warning(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("lib", "*.so", "__pycache__")
    shutil.copytree(ROOT / "knnext", tmp_path / "knnext", ignore=ignored)
    torch.save(cases(), tmp_path / "cases.pt")
    code = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path.insert(0, '')\n" + FALLBACK
    said = json.loads(run_python(code))
    assert Path(said["file"]).is_relative_to(tmp_path)
    assert len(said["warnings"]) == 1
    assert "plain PyTorch, slow, stands in on CPU for all ops" in said["warnings"][0]
    assert said["fallbacks"] == [f"CPU {name}" for name in NAMES] and said["grad"] != 0

    results, errors = iter(torch.load(tmp_path / "results.pt")), iter(said["errors"])
    for name, args in cases_as_saved(tmp_path):
        try:
            want = getattr(knnext, name)(*args)
        except RuntimeError as error:
            text = str(error)
            text = text[text.find("knnext::") :].split("\n")[0]
            assert next(errors) == text
        else:
            torch.testing.assert_close(next(results), want, rtol=1e-5, atol=1e-5)


def cases_as_saved(folder: Path) -> list[tuple[str, tuple]]:
    return torch.load(folder / "cases.pt")
