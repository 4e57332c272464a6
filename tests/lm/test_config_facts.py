"""What of a config bears on states: settings that no weight tells, and what is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.datastore import Datastore, IncompatibleDatastoreError
from knnext.lm.config_facts import settings_differences, state_facts

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
REVISION = "tensors:0123"


def facts(kind: str = "Gemma2", **values: Any) -> str:
    return state_facts(getattr(transformers, f"{kind}Config")(**{**SIZES, **values}))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("attn_logit_softcapping", {"attn_logit_softcapping": 20.0}),
        ("final_logit_softcapping", {"final_logit_softcapping": None}),
        ("query_pre_attn_scalar", {"query_pre_attn_scalar": 8}),
        ("sliding_window", {"sliding_window": 16}),
        ("rms_norm_eps", {"rms_norm_eps": 1e-3}),
        ("num_attention_heads", {"num_attention_heads": 8}),
        ("rope_parameters.rope_theta", {"rope_parameters": {"rope_theta": 5e5}}),
        ("rope_parameters.rope_type", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ("hidden_activation", {"hidden_activation": "silu"}),
    ],
)
def test_settings_that_change_states(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    """Refused by their names where the weights are the same ones; also when a build goes on."""
    old, new = {"config": facts()}, {"config": facts(**values)}
    assert f"datastore has {name} " in "; ".join(settings_differences(old, new))
    options: dict[str, Any] = {"model_revision": REVISION, "model": old}
    with Datastore.create(tmp_path / "s", 4, **options) as store:
        store.append(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    store.check_compatible(model_revision=REVISION, model=old)
    with pytest.raises(IncompatibleDatastoreError, match=f"differ in config.* {name} "):
        store.check_compatible(model_revision=REVISION, model=new)
    with pytest.raises(IncompatibleDatastoreError, match=f"differ in config.* {name} "):
        Datastore.create(tmp_path / "s", 4, model_revision=REVISION, model=new, resume=True)
    # Of a datastore that was written before settings were, nothing is asked.
    assert settings_differences({"weights": "0123"}, new) == settings_differences(None, new) == []


@pytest.mark.parametrize(
    "values",
    [
        {"attention_dropout": 0.3},
        {"initializer_range": 0.5},
        {"use_cache": False},
        {"pad_token_id": 5, "eos_token_id": [1, 2]},
        {"dtype": "bfloat16"},
        {"output_hidden_states": True},
        {"id2label": {0: "a"}},
    ],
)
def test_settings_that_do_not(values: dict[str, Any]) -> None:
    assert facts(**values) == facts()


def test_what_one_side_does_not_know_is_not_compared() -> None:
    """Another release of transformers has other settings, and other names for some."""
    old = json.loads(facts("Llama"))
    new = {**old, "new_setting": 3, "rope_parameters": {**old["rope_parameters"], "new": 1}}
    sides = ({"config": json.dumps(old)}, {"config": json.dumps(new)})
    assert settings_differences(*sides) == settings_differences(*sides[::-1]) == []


def test_a_kind_of_quantization_that_the_weights_do_not_tell() -> None:
    """int8wo and int8dq have the same weights. An earlier knnext wrote the method alone."""
    weights, both = "torchao Int8WeightOnlyConfig", "torchao Int8DynamicActivationInt8WeightConfig"
    found = settings_differences({"quantization": weights}, {"quantization": both})
    assert found == [
        f"the models differ in quantization: datastore has {weights}, asked for {both}"
    ]
    assert settings_differences({"quantization": "torchao"}, {"quantization": weights}) == []
    assert settings_differences({}, {"quantization": weights}) == []
