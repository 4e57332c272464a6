"""KNNLM with ``logits_to_keep``: any positions in any order, held to float64 by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from knnext.lm.knnlm import KNNLM
from tests.lm.test_knnlm import by_hand, index_of
from tests.lm.tiny_models import random_tokens, tiny

IDS = random_tokens(16, seed=5).view(2, 8)
LABELS = IDS.clone()
LABELS[0, 2] = LABELS[1, 5] = -100
KEPT: dict[str, Any] = {
    "the last": 3,
    "all": 0,
    "more than all": 20,
    "places": torch.tensor([1, 4]),
    "from the end": torch.tensor([-1, -3]),
    "as many as there are": torch.arange(8).flip(0),
    "as many, some twice": torch.tensor([0, 0, 1, 2, 3, 4, 5, 6]),
    "a mask": torch.arange(8) % 3 == 0,
    "a list": [1, 4],
    "a range": range(2, 5),
    "an array": np.array([2, 5]),
    "the first": slice(0, 3),
    "every other": slice(1, None, 2),
}


def wanted_places(keep: Any) -> list[int]:
    if isinstance(keep, int):
        keep = slice(-keep, None)
    if isinstance(keep, slice):
        return list(range(8))[keep]
    places = torch.as_tensor(list(keep))
    return torch.arange(8)[places].tolist()


@pytest.fixture(scope="module", params=["att", "ffn"])
def mixed(request: Any) -> tuple[KNNLM, Tensor]:
    """One whose keys are read before positions are dropped, one after; and log p by hand."""
    model = tiny("gpt2")
    index = index_of(model, random_tokens(60), key_layer=request.param)
    lm = KNNLM(model, index, k=4, temperature=0.5, lmbda=0.6)
    return lm, by_hand(model, index, IDS, request.param, 4, 0.5, 0.6)


@torch.no_grad()
@pytest.mark.parametrize("name", KEPT)
def test_positions_by_hand(mixed: tuple[KNNLM, Tensor], name: str) -> None:
    (lm, log_p), keep = mixed, KEPT[name]
    places = wanted_places(keep)
    lm.index.searched.clear()
    found = lm(IDS, logits_to_keep=keep, labels=LABELS)
    assert lm.index.searched == [2 * len(places)]
    torch.testing.assert_close(found.logits.double(), log_p[:, places], atol=2e-4, rtol=2e-4)
    pairs = [(b, i) for b in range(2) for i in places if i < 7 and LABELS[b, i + 1] != -100]
    nll = [-log_p[b, i, LABELS[b, i + 1]].item() for b, i in pairs]
    assert found.loss.item() == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    with lm.attached() as model:
        inside = model(IDS, logits_to_keep=keep, labels=LABELS)
    assert torch.equal(inside.logits, found.logits) and torch.equal(inside.loss, found.loss)


@torch.no_grad()
@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_searched_of_them(mixed: tuple[KNNLM, Tensor], name: str) -> None:
    (lm, log_p), keep = mixed, KEPT[name]
    places, mask = wanted_places(keep), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0  # on the right, so that the other states are as they were
    chosen = torch.arange(8).expand(2, 8) % 2 == 1
    seen = (mask.bool() & chosen)[:, places]
    base = lm.model(IDS, attention_mask=mask).logits.log_softmax(-1)[:, places]
    lm.index.searched.clear()
    found = lm(IDS, attention_mask=mask, searched=chosen, logits_to_keep=keep).logits
    assert sum(lm.index.searched) == int(seen.sum())
    torch.testing.assert_close(found[~seen], base[~seen])
    torch.testing.assert_close(found[seen].double(), log_p[:, places][seen], atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_padding_of_one_token(mixed: tuple[KNNLM, Tensor]) -> None:
    lm, _ = mixed
    lm.index.searched.clear()
    lm(IDS[:, :1], attention_mask=torch.tensor([[0], [1]]))
    assert lm.index.searched == [1]


@torch.no_grad()
def test_shifted_labels_of_all_positions_or_of_the_kept(mixed: tuple[KNNLM, Tensor]) -> None:
    lm, log_p = mixed
    shifted, keep = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100), torch.tensor([6, 2])
    wanted = -log_p[:, keep].gather(2, shifted[:, keep, None]).mean().item()
    for given in (shifted, shifted[:, keep]):
        found = lm(IDS, labels=IDS, shift_labels=given, logits_to_keep=keep).loss
        assert found.item() == pytest.approx(wanted, rel=1e-4)


@torch.no_grad()
def test_no_places(mixed: tuple[KNNLM, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must be an int or positions \(n,\), got .*Tensor"):
        mixed[0](IDS, logits_to_keep=torch.tensor([[1, 2]]))
