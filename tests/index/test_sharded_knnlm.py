"""KNNLM over a ShardedIndex: each rank continues prompts of its own, as many as it has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.datastore import Datastore
from knnext.index import ExactIndex, ShardedIndex
from knnext.lm.knnlm import KNNLM
from tests.index.threads import PATIENCE, on_ranks
from tests.lm.tiny_models import VOCAB, tiny

pytest.importorskip("transformers")


def test_ranks_continue_their_own_prompts(tmp_path: Path) -> None:
    keys = torch.randn(400, 32, generator=torch.Generator().manual_seed(1))
    with Datastore.create(
        tmp_path / "s", 32, torch.float16, key_layer="att", vocab_size=VOCAB
    ) as made:
        made.append(keys, torch.arange(400) % VOCAB)
    store, model = Datastore.open(tmp_path / "s"), tiny("llama")
    prompts = torch.randint(3, VOCAB, (3, 1, 5), generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"min_new_tokens": 2}

    def continued(lm: KNNLM, number: int) -> list[int]:
        return lm.generate(prompts[number], max_new_tokens=3 + number, **options)[0].tolist()

    exact = KNNLM(model, ExactIndex(store), k=9, temperature=1.0, lmbda=0.9)
    wanted = [continued(exact, number) for number in range(3)]
    assert wanted != [continued(KNNLM(model, ExactIndex(store), k=9, lmbda=0), n) for n in range(3)]

    def work(group: Any, rank: int) -> list[list[int]]:
        index = ShardedIndex(store, group, timeout=PATIENCE)
        lm = KNNLM(copy.deepcopy(model), index, k=9, temperature=1.0, lmbda=0.9)
        with index.together():  # the first has two, the second one, the third none
            return [continued(lm, number) for number in ([0, 2], [1], [])[rank]]

    assert on_ranks(3, work) == [[wanted[0], wanted[2]], [wanted[1]], []]
