"""Labels inside attached(): the loss is the mixture's, as the base model takes its own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knnext.lm.knnlm import KNNLM
from tests.lm.every_model import every
from tests.lm.test_knnlm import greedy, index_of
from tests.lm.tiny_models import CONFIGS, num_hooks, random_tokens, tiny, transformers

IDS = random_tokens(30, seed=5).view(2, 15)
LABELS = IDS.clone()
LABELS[0, :6] = -100


def make(name: str, **options: Any) -> KNNLM:
    model = tiny(name)
    return KNNLM(model, index_of(model, random_tokens(60)), **{"k": 8, "lmbda": 0.4, **options})


def nll(logits: Tensor, labels: Tensor, first: int = 0) -> list[float]:
    """Of each label that counts, from positions ``first`` on; the logits are all positions'."""
    return [
        -logits[b, i, labels[b, i + 1]].item()
        for b in range(len(labels))
        for i in range(first, labels.shape[1] - 1)
        if labels[b, i + 1] != -100
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mamba"])
def test_loss_inside_attached(name: str) -> None:
    mixed = make(name)
    base = mixed.model(input_ids=IDS, labels=LABELS).loss
    logits = mixed(input_ids=IDS).logits
    with mixed.attached() as model:
        output = model(input_ids=IDS, labels=LABELS)
        plain = model(IDS)
    assert output.loss.item() == pytest.approx(mean(nll(logits, LABELS)), rel=1e-5)
    assert abs(output.loss - base) > 1e-3
    assert torch.equal(output.logits, logits) and output[0] is output["loss"] is output.loss
    assert plain.loss is None and "loss" not in plain and plain[0] is plain.logits
    assert torch.equal(mixed(input_ids=IDS, labels=LABELS).loss, output.loss)
    assert torch.equal(mixed.model(input_ids=IDS, labels=LABELS).loss, base)


@torch.no_grad()
def test_arguments_by_position() -> None:
    """Mask and labels are found where they stand in the model's own signature."""
    mixed, mask = make("llama"), torch.ones_like(IDS)
    mask[1, :4] = 0
    expected = mixed(input_ids=IDS, attention_mask=mask, labels=LABELS)
    with mixed.attached() as model:
        output = model(IDS, mask, None, None, None, LABELS)
        with pytest.raises(TypeError, match="arguments by position"):
            model(*[None] * 40)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.logits, expected.logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tuples(name: str) -> None:
    mixed = make(name)
    expected = mixed(input_ids=IDS, labels=LABELS)
    with mixed.attached() as model:
        loss, logits = model(input_ids=IDS, labels=LABELS, return_dict=False, use_cache=False)
        (alone,) = model(input_ids=IDS, return_dict=False, use_cache=False)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
    assert torch.equal(alone, expected.logits)
    assert torch.equal(mixed(input_ids=IDS, labels=LABELS, return_dict=False)[0], loss)


@torch.no_grad()
def test_num_items_in_batch_and_shifted_labels() -> None:
    mixed = make("gpt2")
    values = nll(mixed(input_ids=IDS).logits, LABELS)
    with mixed.attached() as model:
        summed = model(input_ids=IDS, labels=LABELS, num_items_in_batch=torch.tensor(50)).loss
        shifted = nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
        moved = model(input_ids=IDS, labels=IDS, shift_labels=shifted).loss
    assert summed.item() == pytest.approx(sum(values) / 50, rel=1e-5)
    assert moved.item() == pytest.approx(mean(values), rel=1e-5)


@torch.no_grad()
def test_a_loss_function_of_the_users_gets_the_mixture() -> None:
    model = copy.deepcopy(tiny("gpt2"))
    mixed = KNNLM(model, index_of(model, random_tokens(60)), 8, lmbda=0.4)
    logits = mixed(input_ids=IDS).logits

    def least(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        return logits.amin() + labels.sum() + vocab_size

    model.loss_function = least
    with mixed.attached():
        assert torch.equal(model(IDS, labels=IDS).loss, least(logits, IDS, logits.shape[-1]))


@torch.no_grad()
@pytest.mark.parametrize("keep", [3, 14, torch.tensor([2, 5, 13])])
def test_logits_to_keep_with_labels(keep: Any) -> None:
    """Each position that is kept is held against the label after it."""
    mixed = make("llama")
    logits = mixed(input_ids=IDS).logits
    places = range(15 - keep, 15) if isinstance(keep, int) else keep.tolist()
    wanted = [-logits[b, i, IDS[b, i + 1]].item() for b in range(2) for i in places if i < 14]
    for call in (mixed, None):
        with mixed.attached() as model:
            output = (call or model)(input_ids=IDS, labels=IDS, logits_to_keep=keep)
        assert output.loss.item() == pytest.approx(mean(wanted), rel=1e-5)


@torch.no_grad()
def test_labels_where_only_the_last_position_has_logits() -> None:
    mixed = make("gpt2")
    with (
        mixed.attached(last_only=True) as model,
        pytest.raises(ValueError, match="only the last position"),
    ):
        model(input_ids=IDS, labels=IDS)


@torch.no_grad()
def test_a_routers_loss_is_added_as_the_model_does() -> None:
    config = copy.deepcopy(tiny("mixtral").config)
    config.output_router_logits, config.router_aux_loss_coef = True, 0.5
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    mixed = KNNLM(model, index_of(model, random_tokens(60)), 8, lmbda=0.4)
    output = mixed(input_ids=IDS, labels=LABELS)
    wanted = mean(nll(output.logits, LABELS)) + 0.5 * output.aux_loss.item()
    assert output.aux_loss > 0 and output.loss.item() == pytest.approx(wanted, rel=1e-5)


class Unshifted(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    """A model whose loss is not that of the next token."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **{**kwargs, "return_dict": True})
        if labels is not None:
            output.loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


@torch.no_grad()
def test_a_loss_of_the_models_own_making_is_not_guessed() -> None:
    model = Unshifted(tiny("gpt2").config).eval()
    mixed = KNNLM(model, index_of(model, random_tokens(60)), 8)
    assert mixed(input_ids=IDS).logits.shape == (2, 15, 97)
    with mixed.attached(), pytest.raises(RuntimeError, match="loss in a way of its own"):
        model(input_ids=IDS, labels=IDS)


@torch.no_grad()
def test_a_model_that_fails_on_labels_of_text_alone() -> None:
    """GIT takes the first labels for those of an image. Its logits are mixed all the same."""
    model = every("git")
    mixed = KNNLM(model, index_of(model, random_tokens(60)), 8, 2.0, 0.4)
    assert mixed(input_ids=IDS).logits.shape == (2, 15, 97)
    with pytest.raises(RuntimeError, match=r"GitForCausalLM fails on labels.*from its logits"):
        mixed(input_ids=IDS, labels=IDS)


@torch.no_grad()
def test_a_target_that_no_neighbor_has() -> None:
    mixed = make("gpt2", k=1, lmbda=1.0)
    assert mixed(input_ids=IDS, labels=IDS).loss == float("inf")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("batch", [2, 4])
def test_trainers_evaluate(tmp_path: Path, smoothing: float, batch: int) -> None:
    """The real Trainer: inside the block it reports the mixture, before and after it the base."""
    pytest.importorskip("accelerate")
    mixed = make("llama")
    rows = [random_tokens(12, seed=seed) for seed in range(8)]
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = transformers.Trainer(
        model=mixed.model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=batch,
            label_smoothing_factor=smoothing,
            **options,
        ),
        eval_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    base = trainer.evaluate()["eval_loss"]
    with mixed.attached():
        found = trainer.evaluate()["eval_loss"]
    ids = torch.stack(rows)
    with torch.no_grad():
        log_p = mixed(input_ids=ids).logits[:, :-1]
    target = -log_p.gather(2, ids[:, 1:, None]).mean().item()
    wanted = (1 - smoothing) * target - smoothing * log_p.mean().item()
    assert found == pytest.approx(wanted, rel=1e-4)
    assert abs(base - found) > 1e-3 and trainer.evaluate()["eval_loss"] == base
    trainer = transformers.Trainer(
        model=mixed, args=trainer.args, eval_dataset=trainer.eval_dataset
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # without tied weights, and with
def test_what_a_trainer_saves(tmp_path: Path, kind: str) -> None:
    """Inside the block the base model; of a KNNLM its bare weights, by its own names."""
    pytest.importorskip("accelerate")
    safetensors = pytest.importorskip("safetensors.torch")
    model = copy.deepcopy(tiny(kind))
    mixed = KNNLM(model, index_of(model, random_tokens(60)), 8, lmbda=0.4)
    before = [parameter.clone() for parameter in model.parameters()]
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_strategy="no", learning_rate=0.1, **options
    )
    rows = [{"input_ids": row, "labels": row} for row in (random_tokens(12, seed=1),)]

    def train(model: Any, folder: Path) -> None:
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        trainer.save_model(str(folder))

    with mixed.attached() as lent:
        train(lent, tmp_path / "attached")
    saved = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "attached", trust_remote_code=False
    )
    assert all(map(torch.equal, saved.parameters(), model.parameters()))
    assert not all(map(torch.equal, before, model.parameters()))
    if kind == "gpt2":
        with pytest.raises(RuntimeError, match="share memory"):
            train(mixed, tmp_path / "mixed")
        return
    train(mixed, tmp_path / "mixed")
    weights = safetensors.load_file(tmp_path / "mixed" / "model.safetensors")
    assert all(name.startswith("model.") for name in weights)
    mixed.load_state_dict(weights)


def test_training_through_the_block_reaches_the_base() -> None:
    model = copy.deepcopy(tiny("gpt2"))
    mixed = KNNLM(model, index_of(model, random_tokens(60)), 8, lmbda=0.4)
    with mixed.attached():
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.lm_head.parameters())
    assert torch.equal(greedy(mixed, IDS), greedy(mixed, IDS))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))])
def test_a_copy_made_while_the_model_is_lent(copied: Any) -> None:
    """It has the hooks with it, which must not act beside its own."""
    model, ids = tiny("gpt2"), random_tokens(9)[None]
    lm = KNNLM(model, index_of(model, random_tokens(60)), 4, 0.5, 0.6)
    with lm.attached():
        other = copied(lm)
    output, wanted = other(ids, labels=ids), lm(ids, labels=ids)
    assert torch.equal(output.loss, wanted.loss)
    assert torch.equal(output.logits, wanted.logits)
    assert isinstance(other(ids, return_dict=False), tuple)
    assert num_hooks(other.model) == 0
