"""`att` in every causal LM of the installed transformers: the module of docs/models.md."""

from __future__ import annotations

import re

import pytest
import torch

from knnext.lm.causal import NotCausalError, check_causal
from knnext.lm.feed_forward import find_feed_forward
from knnext.lm.key_layer import capture_hidden_states
from tests.lm.every_model import NAMES, NOT_BUILT, every
from tests.lm.model_table import CHECKS, DOCS, row

#: One of each kind of block, and those that once got another module than their feed-forward.
FAST = {
    "gemma3n_text": "model.layers.3.mlp",
    "gemma4_text": "model.layers.3.mlp",
    "gemma4_text, experts": "model.layers.3.mlp",
    "bert, is_decoder": "bert.encoder.layer.3.intermediate",
    "roberta, is_decoder": "roberta.encoder.layer.3.intermediate",
    "roberta-prelayernorm, is_decoder": "roberta_prelayernorm.encoder.layer.3.intermediate.dense",
    "zamba2": "model.layers.3.shared_transformer.feed_forward",
    "nemotron_h": "model.layers.3.mixer",
    "inkling_text": "model.layers.3.mlp",
    "longcat_flash": "model.layers.3.mlps.1",
    "bart": "model.decoder.layers.3.fc1",
    "qwen4_exp_text": "model.layers.3.mlp",
}


def listed() -> dict[str, list[str]]:
    lines = re.findall(r"^\| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [line.split(" | ") for line in lines]
    return {row[0]: row for row in cells if row[0] not in ("family",)}


@pytest.mark.parametrize(
    "scale", [1.0, *(pytest.param(scale, marks=pytest.mark.slow) for scale in (1e-3, 30.0))]
)
@pytest.mark.parametrize("name", FAST)
def test_neither_seed_nor_size_of_weights_decides(name: str, scale: float) -> None:
    for seed in (0, 1):
        model = every(name, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(scale)
        assert find_feed_forward(model).name == FAST[name]


@pytest.mark.parametrize("name", ["bert, is_decoder", "gemma4_text", "gpt2", "olmo2"])
def test_projections_that_begin_at_zero_hide_nothing(name: str) -> None:
    """All-zero matrices make attention give 0 everywhere: it still mixes."""
    expected = find_feed_forward(every(name)).name
    model = every(name)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if module_name.endswith(("o_proj", "c_proj", "down_proj", "output.dense")):
                module.weight.zero_()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert find_feed_forward(model).name == expected
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text, experts", "bert, is_decoder"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decides_alike(name: str, dtype: torch.dtype) -> None:
    assert find_feed_forward(every(name).to(dtype)).name == FAST[name]


def test_the_key_is_the_norms_output() -> None:
    model = every("gemma4_text, experts")
    found = find_feed_forward(model)
    given: list[torch.Tensor] = []
    norm = model.get_submodule(found.norm)
    handle = norm.register_forward_hook(lambda _, __, output: given.append(output))
    with torch.no_grad(), capture_hidden_states(model, "att") as captured:
        model(input_ids=torch.arange(3, 12)[None])
        assert torch.equal(captured.states(1), given[-1])
    handle.remove()


def test_every_family_has_a_row() -> None:
    rows = listed()
    assert set(rows) == set(NAMES)
    assert all(
        set(cells[-1]) <= set(CHECKS) for cells in rows.values() if "refused" not in cells[2]
    )
    for name, module in FAST.items():
        assert rows[name][2] == f"`{module}`"


def test_what_is_refused_is_few_and_said() -> None:
    refused = {n: r[2] for n, r in listed().items() if r[2].startswith("refused")}
    assert len(refused) < 40
    for name, reason in refused.items():
        assert ("not tried" in reason) == (name in NOT_BUILT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(8))
def test_the_table_holds(part: int) -> None:
    rows = listed()
    for name in NAMES[part::8]:
        assert str(row(name)) == "| " + " | ".join(rows[name]) + " |", name


def test_the_table_is_of_models_that_pass_the_trial() -> None:
    for name in ("gpt2", "bart"):
        check_causal(every(name))
    with pytest.raises(NotCausalError):
        check_causal(every("bert"))
