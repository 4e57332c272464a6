"""What the experiments share: made once, consistent with itself, and of the right meaning."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from knnext.experiments.lab import Lab
from knnext.experiments.lab.family import Setting, row_log_p
from knnext.experiments.lab.presets import TINY
from knnext.index import ExactIndex


def test_states_of_the_output_layer_give_the_lm(tiny_lab):
    split, states = tiny_lab.split("test"), tiny_lab.states("test", "ffn")
    log_p = tiny_lab.lm_logits("test").log_softmax(1).gather(1, states.targets[:, None]).squeeze(1)
    torch.testing.assert_close(log_p.double(), split.log_p_lm, atol=1e-3, rtol=1e-4)
    # The LM is a member of the family: W_ds = W_sm, every row kept.
    member = row_log_p(states.keys, tiny_lab.lm().output_embedding, states.targets)
    torch.testing.assert_close(member, split.log_p_lm, atol=1e-3, rtol=1e-4)


def test_counts_are_of_the_scored_tokens(tiny_lab):
    for name, wanted in (("valid", TINY.valid_tokens), ("test", TINY.test_tokens)):
        split = tiny_lab.split(name)
        assert split.counts.tokens == split.log_p_lm.numel() == split.targets.numel()
        assert 0.5 * wanted < split.counts.tokens <= wanted
        assert split.counts.documents > 3
        assert split.counts.words is not None
        assert split.counts.words < split.counts.tokens


def test_the_datastore_holds_pairs_of_state_and_next_token(tiny_lab):
    store, text = tiny_lab.store("att"), tiny_lab.text("store")
    assert len(store) == len(text) - 1 <= TINY.entries
    assert (store.values[0 : len(store)] == torch.from_numpy(text.tokens[1:])).all()
    assert store.key_layer == "att"
    assert tiny_lab.store("ffn").key_layer == "ffn"


def test_searches_are_made_once_and_equal_the_index(tiny_lab, monkeypatch):
    found = tiny_lab.neighbors(Setting(), "test", keep_indices=True)
    tiny_lab.neighbors(Setting(), "valid", keep_indices=True)
    keys = tiny_lab.states("test", "att").keys[:50]
    distances, rows = ExactIndex(tiny_lab.store("att")).search(keys, TINY.k)
    torch.testing.assert_close(found.distances[:50], distances)
    assert (found.indices[:50] == rows).all()
    values = tiny_lab.store("att").values[0 : len(tiny_lab.store("att"))]
    assert (found.tokens[:50] == values[rows]).all()

    def refuse(*_args, **_kwargs):
        raise AssertionError("searched again")

    monkeypatch.setattr("knnext.experiments.lab.searches.search", refuse)
    for temperature in (0.5, 2.0):
        tiny_lab.component(replace(Setting(), temperature=temperature), keep_indices=True)


def test_smaller_samples_are_subsets(tiny_lab):
    small, large = (tiny_lab.store("att", fraction=f) for f in (0.05, 0.3))
    assert len(small) == round(0.05 * len(tiny_lab.store("att")))
    rows = {row.numpy().tobytes() for row in large.keys[0 : len(large)]}
    assert all(row.numpy().tobytes() in rows for row in small.keys[0 : len(small)])


def test_zero_rows_have_a_value_that_no_text_contains(tiny_lab):
    padded = tiny_lab.store("att", padding=0.264)
    assert tiny_lab.padding_token == TINY.train.vocab_size
    for name in ("valid", "test"):
        assert (tiny_lab.split(name).targets < tiny_lab.padding_token).all()
    assert int(padded.values[len(padded) - 1]) == tiny_lab.padding_token


def test_seeds_are_different_models_of_one_tokenizer(tiny_lab):
    first, second = tiny_lab.split("valid"), tiny_lab.split("valid", tiny_lab.lm(1))
    assert (first.targets == second.targets).all()
    assert not torch.allclose(first.log_p_lm, second.log_p_lm)


def test_a_second_lab_finds_everything(tiny_lab, monkeypatch):
    tiny_lab.split("test")
    said: list[str] = []
    again = Lab(TINY, tiny_lab.folder, say=said.append)
    torch.testing.assert_close(again.split("test").log_p_lm, tiny_lab.split("test").log_p_lm)
    assert said == []


@pytest.mark.slow
def test_a_given_model_is_used_as_it_is(tiny_lab, tmp_path):
    from knnext.lm.load import save_lm

    save_lm(tmp_path / "model", tiny_lab.lm().model, tiny_lab.tokenizer)
    preset = TINY.with_options(model=str(tmp_path / "model"))
    lab = Lab(preset, tmp_path / "lab", say=lambda _line: None)
    torch.testing.assert_close(lab.split("valid").log_p_lm, tiny_lab.split("valid").log_p_lm)
    with pytest.raises(ValueError, match="none of seed 1"):
        lab.lm(1)


def test_text_of_changed_files_is_not_that_of_the_cache(tmp_path):
    from knnext.experiments.lab.texts import files_key

    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name} words")
    lab = Lab(TINY.with_options(corpus=str(tmp_path)), tmp_path / "lab")
    before = lab._text_settings
    assert before["corpus files"] == files_key(tmp_path) == files_key(tmp_path, lab.folder)
    (tmp_path / "valid.txt").write_text("valid words")  # written again, and the same
    assert Lab(lab.preset, lab.folder)._text_settings == before
    (tmp_path / "valid.txt").write_text("valid wards")
    after = Lab(lab.preset, lab.folder)._text_settings
    assert after != before
    lab.folder.mkdir()
    (lab.folder / "report.md").write_text("a result, in the corpus' own folder")
    (tmp_path / ".hidden").write_text("")
    assert Lab(lab.preset, lab.folder)._text_settings == after
    assert "corpus files" not in Lab(TINY, lab.folder)._text_settings  # stdlib is no path


def test_a_model_that_scales_its_logits_is_refused(tiny_lab):
    lm = tiny_lab.lm()
    tiny_lab.check_output_layer(lm)
    scaled = copy.deepcopy(lm.model)
    scaled.lm_head.weight = torch.nn.Parameter(2 * scaled.lm_head.weight)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel does more .* than W h \+ b"):
        tiny_lab.lm_logits("test", replace(lm, model=scaled))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lab: lab.text("dev"), "split must be one of"),
        (lambda lab: lab.states("train"), "split must be one of"),
        (lambda lab: lab.neighbors(Setting(w_ds="embedding"), "test"), "only a datastore"),
    ],
)
def test_bad_requests_are_named(tiny_lab, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_lab)
