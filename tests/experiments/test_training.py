"""The training loop: it finds what is known, repeats itself, and keeps the best weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from knnext.experiments.lab.examples import Examples, layer_examples
from knnext.experiments.lab.training import Schedule, Trained, log_p, nll, train, trained
from knnext.experiments.lab.word_rows import WordRows, even_layout


def planted(count, seed, words=4):
    """One-hot states; state i is followed by word i three times of four, else by the next."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(words, (count,), generator=generator)
    other = torch.rand(count, generator=generator) < 0.25
    states = nn.functional.one_hot(which, words).half()
    return Examples((states,), torch.where(other, (which + 1) % words, which))


def new(seed=0):
    return WordRows(even_layout(4, 1), 4, torch.Generator().manual_seed(seed))


def test_the_planted_distribution_is_found():
    module, examples = new(), planted(4000, 0)
    train(module, examples, planted(1000, 1), Schedule(200, 128, learning_rate=0.05))
    p = module.rows.detach().T.softmax(1)  # row i: after state i
    wanted = 0.75 * torch.eye(4) + 0.25 * torch.eye(4).roll(1, 1)
    torch.testing.assert_close(p, wanted, atol=0.03, rtol=0)
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    assert float(nll(log_p(module, examples), examples)) == pytest.approx(float(entropy), abs=0.02)


def test_a_seed_decides_everything():
    histories = []
    for seed in (0, 0, 1):
        module = new()
        history = train(module, planted(500, 0), planted(100, 1), Schedule(20, 64), seed=seed)
        histories.append((history, module.rows.detach().clone()))
    assert histories[0][0] == histories[1][0] and histories[0][0] != histories[2][0]
    assert torch.equal(histories[0][1], histories[1][1])


def test_the_weights_with_the_lowest_valid_loss_are_left():
    train_on, valid = planted(1000, 0), planted(200, 1)
    # What is learned is wrong for this valid split: its loss only rises.
    valid = Examples(valid.states, (valid.targets + 2) % 4)
    module = new()
    history = train(module, train_on, valid, Schedule(40, 64, 0.1, checks=10))
    losses = [h["valid"] for h in history]
    assert len(losses) == 10 and losses[0] == min(losses) < losses[-1]
    assert float(nll(log_p(module, valid), valid)) == pytest.approx(losses[0], abs=1e-6)


def test_the_loss_reads_what_the_examples_hold_besides():
    examples = planted(200, 0)
    weighted = Examples(examples.states, examples.targets, {"weight": torch.zeros(200)})
    module = new()
    before = module.rows.detach().clone()

    def loss(log_p, batch):
        return -(log_p * batch.extra["weight"]).sum()

    train(module, weighted, weighted, Schedule(5, 64), loss=loss)
    assert torch.equal(module.rows.detach(), before)


def test_products_are_exact_again_after_training():
    examples = planted(100, 0)
    before = torch.get_float32_matmul_precision()
    train(new(), examples, examples, Schedule(1, 10))
    assert torch.get_float32_matmul_precision() == before


def test_rates_rise_and_come_down():
    schedule = Schedule(100, warmup=0.1)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[9] == 1 and rates[:10] == sorted(rates[:10]) and rates[0] > 0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.01
    assert [s for s in range(1, 101) if schedule.is_check(s)][-1] == 100


def test_the_number_of_checks_is_kept_and_the_end_is_one_of_them():
    for steps, checks in ((7, 3), (8, 8), (30, 8), (5, 8)):
        due = [s for s in range(1, steps + 1) if Schedule(steps, checks=checks).is_check(s)]
        assert len(due) == min(steps, checks) and due[-1] == steps


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="steps"):
        Schedule(0)


def test_convergence_is_read_from_the_second_half():
    def run(*losses):
        history = [{"step": i, "train": 0.0, "valid": v} for i, v in enumerate(losses)]
        return Trained({}, {}, history, 0.0)

    assert run(5, 4, 3, 1.5, 1.13, 1.11, 1.101, 1.1).converged is False
    assert run(5, 4, 3, 1.115, 1.11, 1.104, 1.101, 1.1).converged
    assert not run(5.0).converged


def test_a_training_is_kept_and_taken_up(tiny_lab):
    calls = []

    def build(generator):
        calls.append(1)
        return WordRows(even_layout(512, 1), 32, generator)

    def once(seed=0):
        examples = layer_examples(tiny_lab, "att")
        return trained(tiny_lab, "a test", {}, build, examples, Schedule(3, 64), seed=seed)

    first, again, other = once(), once(), once(1)
    assert len(calls) == 2
    for split in ("valid", "test"):
        assert torch.equal(first.log_p[split], again.log_p[split])
        assert first.log_p[split].shape == tiny_lab.split(split).targets.shape
    assert not torch.equal(first.parameters["rows"], other.parameters["rows"])
    assert first.history == again.history


def test_layers_are_read_row_by_row(tiny_lab):
    both = layer_examples(tiny_lab, "att", "ffn")("train")
    store = tiny_lab.store("ffn")
    assert torch.equal(both.states[1][:5], store.keys[0:5])
    assert torch.equal(both.targets[:5], store.values[0:5].long())
    batch = both.at(torch.tensor([3, 7]), "cpu")
    assert batch.states[0].dtype == torch.float32 and len(batch) == 2
