"""Copies, deep and pickled, of models that are in use: plain ones, which nobody listens to."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knnext import KNNLM, Datastore, ExactIndex, KNNLogitsProcessor
from knnext.lm.key_layer import capture_hidden_states
from knnext.lm.running import here
from tests.lm.test_knnlm import index_of
from tests.lm.tiny_models import tiny
from tests.lm.ways import OPTIONS, PLAIN, PROMPTS, TEXT

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # as torch.save does
}
copies = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
layers = pytest.mark.parametrize("layer", ["att", "module:model.layers.1:output"])


@contextmanager
def processed(model: nn.Module, layer: str) -> Iterator[Callable[[], Any]]:
    index = index_of(model, TEXT, key_layer=layer)
    with KNNLogitsProcessor(model, index, **OPTIONS) as neighbors:
        yield lambda: model.generate(PROMPTS, logits_processor=[neighbors], **PLAIN)


@contextmanager
def captured(model: nn.Module, layer: str) -> Iterator[Callable[[], Any]]:
    with torch.no_grad(), capture_hidden_states(model, layer) as found:
        model(PROMPTS)
        yield lambda: found.states(len(PROMPTS)).clone()


@contextmanager
def attached(model: nn.Module, layer: str) -> Iterator[Callable[[], Any]]:
    index = index_of(model, TEXT, key_layer=layer)
    with torch.no_grad(), KNNLM(model, index, **OPTIONS).attached():
        yield lambda: model(PROMPTS).logits


@copies
@layers
@pytest.mark.parametrize("used", [processed, captured, attached])
def test_a_copy_of_a_model_in_use_is_a_plain_one(
    used: Callable[..., Any], layer: str, copied: Callable[[Any], Any]
) -> None:
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        plain, other = model(PROMPTS).logits, model(PROMPTS + 1).logits
    with used(model, layer) as give:
        wanted = give()
        twin = copied(model)
        with torch.no_grad():  # in the same thread, before the model is used again
            assert torch.equal(twin(PROMPTS + 1).logits, other)
        assert torch.equal(give(), wanted)
    with torch.no_grad():
        assert torch.equal(twin(PROMPTS).logits, plain)
    with used(twin, layer) as give:  # by itself as the other was
        assert torch.equal(give(), wanted)
    assert torch.equal(twin(PROMPTS).logits, plain)


def test_a_processor_is_of_one_model() -> None:
    model = copy.deepcopy(tiny("llama"))
    with KNNLogitsProcessor(model, index_of(model, TEXT), **OPTIONS) as neighbors:
        for copied in COPIES.values():
            with pytest.raises(TypeError, match="make one for the copy of the model"):
                copied(neighbors)


def test_a_saved_model_is_loaded_without_knnext() -> None:
    linear = nn.Linear(2, 2)
    linear.register_forward_hook(here(lambda *_: 1))
    saved = pickle.dumps(linear)
    assert b"knnext" not in saved and pickle.loads(saved)(torch.ones(2)).shape == (2,)


@copies
def test_a_copied_knnlm_has_a_model_of_its_own_and_the_same_datastore(
    tmp_path: Path, copied: Callable[[Any], Any]
) -> None:
    model, states = copy.deepcopy(tiny("llama")), torch.randn(50, tiny("llama").config.hidden_size)
    with Datastore.create(tmp_path / "S", states.shape[1], torch.float32, key_layer="att") as store:
        store.append(states, TEXT[:50] if len(TEXT) >= 50 else TEXT.repeat(50)[:50])
    lm = KNNLM(model, ExactIndex(Datastore.open(tmp_path / "S")), **OPTIONS)

    def log_p(lm: KNNLM) -> Tensor:
        with torch.no_grad():
            return lm(PROMPTS).logits

    wanted = log_p(lm)
    with lm.attached():
        twin = copied(lm)
    assert torch.equal(log_p(twin), wanted)
    assert twin.index.datastore.path == lm.index.datastore.path
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(log_p(lm), wanted) and not torch.equal(log_p(twin), wanted)
