"""The loss on sparse targets: its value, its gradient, and a student that it teaches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knnext.corpus import Document, TokenizedDocuments
from knnext.datastore.build import build_datastore
from knnext.distill import DistillationData, collate, distill, mixture_kl, sparse_kl
from knnext.evaluation import search_stream
from knnext.evaluation.tune import tune
from knnext.index import ExactIndex
from knnext.lm.train import train_tokenizer
from tests.lm.tiny_models import tiny

V = 9


def targets(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and targets of five kinds: a tail, none, no neighbor, every token kept, one token."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, V, generator=generator, dtype=torch.float64)
    ids = torch.full((5, V), -1)
    p = torch.zeros(5, V, dtype=torch.float64)
    ids[0, :3], p[0, :3] = torch.tensor([4, 0, 7]), torch.tensor([0.5, 0.25, 0.125]).double()
    ids[1, :2], p[1, :2] = torch.tensor([8, 1]), torch.tensor([0.75, 0.25]).double()
    ids[3] = torch.randperm(V, generator=generator)
    p[3] = torch.rand(V, generator=generator, dtype=torch.float64).softmax(0)
    ids[4, 0], p[4, 0] = 2, 1.0
    tail = (1 - p.sum(1)).clamp_min(0)
    tail[3] = 0
    return logits.to(dtype), ids, p.to(dtype), tail.to(dtype)


def by_definition(logits: Tensor, ids: Tensor, p: Tensor, tail: Tensor) -> Tensor:
    """KL over the kept tokens and "any other", from probabilities."""
    found = []
    for row, q in enumerate(logits.softmax(-1)):
        kept = ids[row] >= 0
        pairs = list(zip(p[row, kept], q[ids[row, kept]], strict=True))
        pairs.append((tail[row], 1 - q[ids[row, kept]].sum()))
        found.append(sum((a * (a / b).log() for a, b in pairs if a > 0), torch.zeros(()).double()))
    return torch.stack(found)


def test_the_value_is_that_of_the_formula() -> None:
    found = sparse_kl(*targets())
    torch.testing.assert_close(found, by_definition(*targets()), atol=1e-12, rtol=1e-10)
    assert found[2] == 0 and torch.all(found[[0, 1, 3, 4]] > 0)
    logits, ids, p, tail = targets()
    # The student that is the teacher, with anything where the tail is.
    exact = torch.full((V,), 0.125 / 6).double()
    exact[ids[0, :3]] = p[0, :3]
    assert abs(float(sparse_kl(exact.log()[None], ids[:1], p[:1], tail[:1]))) < 1e-12
    # Never more than over all tokens, whatever the tail is made of.
    full = torch.rand(V).double()
    full[ids[0, :3]] = 0
    full = full / full.sum() * tail[0]
    full[ids[0, :3]] = p[0, :3]
    over_all = (full * (full.log() - logits[0].log_softmax(-1))).sum()
    assert sparse_kl(logits[:1], ids[:1], p[:1], tail[:1])[0] <= over_all


def test_the_gradient_is_right() -> None:
    logits, ids, p, tail = targets()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sparse_kl(x, ids, p, tail), logits)
    base = torch.randn(5, V).double()
    assert torch.autograd.gradcheck(lambda x: mixture_kl(x, ids, p, tail, base, 0.3), logits)
    sparse_kl(logits, ids, p, tail).sum().backward()
    q = logits.detach().softmax(-1)
    kept = torch.zeros(5, V + 1, dtype=torch.bool).scatter_(1, ids.where(ids >= 0, V), True)[:, :V]
    full = torch.zeros(5, V + 1).double().scatter_(1, ids.where(ids >= 0, V), p)[:, :V]
    rest = (q * ~kept).sum(1, keepdim=True)
    spread = torch.where(kept, full, tail[:, None] * q / rest.clamp_min(1e-30))
    torch.testing.assert_close(logits.grad, q - spread, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_and_far_ones(dtype: torch.dtype) -> None:
    logits, ids, p, tail = targets(torch.float32)
    found = sparse_kl(logits.to(dtype), ids.int(), p.half(), tail)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), by_definition(*targets()), atol=0.02 if dtype != torch.float32 else 1e-3,
        rtol=0.02,
    )  # fmt: skip
    far = torch.full((5, V), -1e4, requires_grad=True, dtype=torch.float32)
    with torch.no_grad():
        far[torch.arange(5), torch.tensor([4, 8, 0, 1, 2])] = 1e4
    loss = sparse_kl(far, ids, p, tail)
    loss.sum().backward()
    assert loss.isfinite().all() and far.grad is not None and far.grad.isfinite().all()


def test_shapes_that_do_not_belong_together() -> None:
    logits, ids, p, tail = targets()
    for wrong in ((logits[:4], ids, p, tail), (logits, ids[:, :2], p, tail),
                  (logits, ids, p, tail[:2])):  # fmt: skip
        with pytest.raises(ValueError, match="logits, ids, p and tail must be"):
            sparse_kl(*wrong)
    with pytest.raises(ValueError, match="base_logits must be of the shape"):
        mixture_kl(logits, ids, p, tail, logits[:2], 0.5)
    beyond = ids.clone()
    beyond[0, 0] = V
    for loss in (sparse_kl, lambda *of: mixture_kl(*of, logits, 0.5)):
        with pytest.raises(ValueError, match=f"got token {V}, and logits are of {V} tokens"):
            loss(logits, beyond, p, tail)
    with pytest.raises(ValueError, match="lmbda must lie in"):
        mixture_kl(logits, ids, p, tail, logits, 1.5)


def test_the_mixture_is_where_its_loss_is_least() -> None:
    """Descent from elsewhere ends at the kNN-LM's own distribution."""
    base, p_knn = torch.randn(1, V).double(), torch.zeros(1, V).double()
    ids = torch.tensor([[3, 5]])
    p_knn[0, [3, 5]] = torch.tensor([0.9, 0.1], dtype=torch.float64)
    sparse = (ids, p_knn[0, ids], torch.zeros(1).double())
    wanted = 0.7 * base.softmax(-1) + 0.3 * p_knn
    logits = wanted.log().clone().requires_grad_()
    mixture_kl(logits, *sparse, base, 0.3).sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-12
    nothing = (torch.full((1, 2), -1), torch.zeros(1, 2).double(), torch.ones(1).double())
    alone = mixture_kl(base + 3, *nothing, base, 0.3)
    assert abs(float(alone)) < 1e-12, "without a neighbor the base model is all there is"


def test_tokens_that_both_models_rule_out() -> None:
    """Logits of -inf, as of a vocabulary that was filled up: no part of the loss is nan."""
    logits, ids, p, tail = targets()
    base = torch.randn(5, V, generator=torch.Generator().manual_seed(2)).double()
    more = torch.full((5, 3), -torch.inf).double()
    wide, wider = torch.cat([logits, more], 1).requires_grad_(), torch.cat([base, more], 1)
    found = mixture_kl(wide, ids, p, tail, wider, 0.3)
    torch.testing.assert_close(found, mixture_kl(logits, ids, p, tail, base, 0.3))
    found.sum().backward()
    assert wide.grad is not None and wide.grad.isfinite().all()
    # And only the base model does: what the student gives there costs it, as it should.
    open_ = torch.cat([logits, torch.zeros(5, 3).double()], 1).requires_grad_()
    spread = mixture_kl(open_, ids, p, tail, wider, 0.3)
    spread.sum().backward()
    assert torch.all(spread > found.detach()) and open_.grad is not None
    assert open_.grad.isfinite().all()


# A student


def chain(seed: int, documents: int, length: int) -> TokenizedDocuments:
    """Texts of one source: each token is mostly one of two that follow the one before."""
    generator = np.random.default_rng(seed)
    follow = np.random.default_rng(5).integers(3, 43, (97, 2))
    tokens = np.empty(documents * length, np.int32)
    for place in range(len(tokens)):
        if place % length == 0:
            tokens[place] = 1
        elif generator.random() < 0.1:
            tokens[place] = generator.integers(3, 43)
        else:
            tokens[place] = follow[tokens[place - 1], int(generator.random() < 0.3)]
    ones = np.ones(documents, int)
    hashes = generator.integers(1, 255, (documents, 16)).astype(np.uint8)
    offsets = np.arange(documents + 1) * length
    names = [f"{seed}-{n}" for n in range(documents)]
    return TokenizedDocuments(tokens, offsets, names, ones, ones, hashes)


def nll(model: Any, text: TokenizedDocuments) -> float:
    blocks = torch.from_numpy(text.tokens[: len(text) // 64 * 64]).long().view(-1, 64)
    with torch.no_grad():
        logits = model(blocks).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()))


@pytest.mark.slow
def test_a_student_approaches_the_knn_lm_that_it_came_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, train, valid = tiny("gpt2"), chain(0, 40, 64), chain(1, 10, 64)
    tokenizer = train_tokenizer([Document("a", "some text to learn from\n" * 9)], vocab_size=260)
    windows = {"block_size": 64, "stride": 48, "batch_size": 8}
    store = build_datastore(base, tokenizer, train, tmp_path / "S", **windows)
    index = ExactIndex(store)
    scores = search_stream(base, index, valid, k=32, **windows)
    fit = tune(scores)
    distill(
        base, index, train, tmp_path / "D", temperature=fit.temperature, k=32, top=16, **windows
    )
    data = DistillationData(tmp_path / "D", 64)
    before, teacher = nll(base, valid), -float(scores.log_p(fit.temperature, fit.lmbda).mean())
    assert teacher < before - 0.5, "there is something to learn"
    student = copy.deepcopy(base).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate)
    for _ in range(30):
        for batch in loader:
            with torch.no_grad():
                base_logits = base(batch["input_ids"]).logits
            logits = student(batch["input_ids"]).logits
            sparse = (batch["ids"], batch["p"], batch["tail"])
            loss = mixture_kl(logits, *sparse, base_logits, fit.lmbda)[batch["mask"]].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = nll(student.eval(), valid)
    share = (before - after) / (before - teacher)
    assert share > 0.6, f"{before:.2f} -> {after:.2f}, the kNN-LM has {teacher:.2f}"
