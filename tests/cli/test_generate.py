"""`generate` and `search`: what is read of a text, what is drawn from, and what is said."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnext.cli import main
from knnext.cli.generate import _decoding, plain_config
from knnext.cli.parser import build_parser
from knnext.evaluation.prompt import pieces, read_prompt
from tests.lm.tiny_models import transformers

WORDS = "the quick brown fox jumps over a lazy dog é 漢字 🦊".split()  # noqa: SIM905
CONTEXT = 32
#: All that a model's file could put between the mixture and what is drawn.
HOSTILE = {
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.5,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.01,
    "num_beams": 4,
    "length_penalty": 3.0,
    "early_stopping": True,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 25,
    "max_length": 3,
    "max_time": 1e-6,
    "suppress_tokens": list(range(1, 100)),
    "begin_suppress_tokens": list(range(100, 200)),
    "forced_eos_token_id": 0,
    "bad_words_ids": [[5], [6]],
    "exponential_decay_length_penalty": [1, 2.0],
    "num_return_sequences": 2,
    "renormalize_logits": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of some documents by an untrained model, whose distribution is nearly flat."""
    from knnext.corpus import Document, tokenize
    from knnext.datastore.build import build_datastore
    from knnext.lm.load import save_lm
    from knnext.lm.train import train_tokenizer

    folder = tmp_path_factory.mktemp("generate")
    rng = np.random.default_rng(0)
    documents = [Document(f"{number}.txt", " ".join(rng.choice(WORDS, 60))) for number in range(8)]
    tokenizer = train_tokenizer(documents, 300)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    save_lm(folder / "model", model, tokenizer)
    build_datastore(model, tokenizer, tokenize(documents, tokenizer), folder / "store")
    return folder


class Run:
    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys, self.model = folder, capsys, folder / "model"
        self.mixture = ["--temperature", "0.05", "--lmbda", "0.5", "--k", "16"]

    def words(self, command: str, text: str, *options: str) -> list[str]:
        mixture = self.mixture if command == "generate" else ["--k", "3"]
        model = ["--model", str(self.model), "--device", "cpu"]
        return [command, str(self.folder / "store"), text, *model, *mixture, *options]

    def __call__(self, command: str, text: str, *options: str, code: int = 0) -> Any:
        self.capsys.readouterr()
        assert main([*self.words(command, text, *options), "--json"]) == code
        captured = self.capsys.readouterr()
        self.err = captured.err
        return captured.err if code else json.loads(captured.out)


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(folder, capsys)


def parsed(*options: str) -> argparse.Namespace:
    return build_parser().parse_args(["generate", "store", "text", "--model", "m", *options])


def opened(folder: Path) -> tuple[Any, Any, Any]:
    from knnext.datastore import Datastore
    from knnext.index import ExactIndex
    from knnext.lm.knnlm import KNNLM
    from knnext.lm.load import load_lm

    model, tokenizer = load_lm(folder / "model")
    store = Datastore.open(folder / "store")
    mixed = KNNLM(model, ExactIndex(store, device="cpu"), 16, 0.05, 0.5)
    return mixed, tokenizer, store


# What is drawn from


def expected_draws(log_p: torch.Tensor, **options: Any) -> torch.Tensor:
    """(V,) the distribution that the options make of the mixture."""
    p = (log_p.double() / options.get("temperature", 1.0)).softmax(0)
    order = p.argsort(descending=True)
    if "top_k" in options:
        p[order[options["top_k"] :]] = 0
    if "top_p" in options:
        before = p[order].cumsum(0) - p[order]
        p[order[before >= options["top_p"]]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--top-k", "80"], {"top_k": 80}),
        (["--top-p", "0.7"], {"top_p": 0.7}),
        (["--sampling-temperature", "0.5"], {"temperature": 0.5}),
    ],
)
def test_samples_come_from_the_mixture(
    folder: Path, words: list[str], options: dict[str, Any]
) -> None:
    """Chi-square of 20,000 first tokens against the mixture itself, past the 50 likeliest."""
    mixed, tokenizer, store = opened(folder)
    mixed.model.generation_config = transformers.GenerationConfig(**HOSTILE)
    mixed.model.generation_config = plain_config(mixed.model, tokenizer)
    ids = torch.tensor([read_prompt("the quick brown", tokenizer, store, None).ids])
    with torch.no_grad():
        wanted = expected_draws(mixed(input_ids=ids).logits[0, -1], **options)
    torch.manual_seed(1)
    many = ids.expand(20_000, -1)
    drawn = mixed.generate(
        many,
        attention_mask=torch.ones_like(many),
        max_new_tokens=1,
        **_decoding(parsed("--do-sample", *words)),
    )[:, -1]
    observed = drawn.bincount(minlength=300).double()
    assert observed[wanted == 0].sum() == 0
    rare = wanted * len(drawn) < 5
    expected = torch.cat([wanted[~rare], wanted[rare].sum()[None]]) * len(drawn)
    found = torch.cat([observed[~rare], observed[rare].sum()[None]])
    kept = expected > 0
    statistic = float(((found - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    # Mean + 4.5 standard deviations; with transformers' hidden 50, many times that.
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5
    if not options:
        beyond = wanted.argsort(descending=True)[50:]
        assert abs(observed[beyond].sum() / len(drawn) - wanted[beyond].sum()) < 0.02
        assert wanted[beyond].sum() > 0.2


@pytest.mark.parametrize(
    "words", [[], ["--num-beams", "3"], ["--do-sample"], ["--do-sample", "--top-k", "90"]]
)
def test_the_models_own_generation_config_changes_nothing(
    run: Run, tmp_path: Path, words: list[str]
) -> None:
    options = (*words, "--max-new-tokens", "8", "--seed", "3")
    plain = run("generate", "the quick", *options)
    shutil.copytree(run.model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(HOSTILE))
    run.model = tmp_path / "model"
    assert run("generate", "the quick", *options) == plain


def test_the_models_end_marks_are_kept() -> None:
    model = argparse.Namespace(
        generation_config=transformers.GenerationConfig(eos_token_id=[7, 8], top_k=3)
    )
    tokenizer = argparse.Namespace(eos_token_id=2, pad_token_id=None)
    config = plain_config(model, tokenizer)
    assert (config.eos_token_id, config.pad_token_id, config.top_k) == ([7, 8], 7, None)
    model.generation_config = transformers.GenerationConfig()
    assert plain_config(model, tokenizer).eos_token_id == 2


@pytest.mark.parametrize("words", [["--top-k", "5"], ["--top-p", "0.5"], ["--min-p", "0.1"],
                                   ["--sampling-temperature", "2"]])  # fmt: skip
def test_options_of_sampling_without_it(run: Run, words: list[str]) -> None:
    assert "are for --do-sample" in run("generate", "the", *words, code=1)


def test_a_seed_moves_the_draw_and_repeats_it(run: Run) -> None:
    draw = ["--do-sample", "--max-new-tokens", "10"]
    one = run("generate", "the", *draw, "--seed", str(2**63 - 1))
    assert one == run("generate", "the", *draw, "--seed", str(2**63 - 1))
    assert one["continuation"] != run("generate", "the", *draw, "--seed", "1")["continuation"]


@pytest.mark.parametrize("seed", ["1" + "0" * 20, "99999999999999999999", "-1", "1.5"])
def test_a_seed_that_no_generator_takes(run: Run, seed: str) -> None:
    assert main(run.words("generate", "the", f"--seed={seed}")) == 2
    err = run.capsys.readouterr().err
    assert "--seed" in err and "2**63" in err and "Traceback" not in err


# Past the context


def test_a_long_text_is_cut_and_that_is_said(run: Run) -> None:
    long = " ".join(["fox over a lazy dog"] * 30)
    found = run("generate", long, "--max-new-tokens", "10")
    assert found["tokens_read"] == CONTEXT - 10
    note = f"the text has {found['tokens_given']} tokens, of which the last {CONTEXT - 10} are read"
    assert note in run.err
    near = run("search", long)
    assert near["tokens_read"] == CONTEXT and f"the last {CONTEXT} are read" in run.err
    assert near["tokens_given"] == found["tokens_given"]


def test_what_fits_exactly_is_not_cut(run: Run, folder: Path) -> None:
    _, tokenizer, store = opened(folder)
    given = read_prompt("the quick brown fox", tokenizer, store, None).given
    found = run("generate", "the quick brown fox", "--max-new-tokens", str(CONTEXT - given))
    assert found["tokens_read"] == found["tokens_given"] == given and "are read" not in run.err
    run("generate", "the quick brown fox", "--max-new-tokens", str(CONTEXT - given + 1))
    assert "are read" in run.err


@pytest.mark.parametrize("asked", [CONTEXT, 1000])
def test_more_asked_for_than_the_context_holds(run: Run, asked: int) -> None:
    err = run("generate", "the quick", "--max-new-tokens", str(asked), code=1)
    assert f"{asked} asked for" in err and f"at most {CONTEXT}" in err and "tokens given" in err


def test_the_default_fits_a_small_context(run: Run) -> None:
    assert len(run("generate", "the quick")["tokens"]) == CONTEXT // 2


def test_a_cut_text_begins_as_the_windows_of_the_store_do(folder: Path) -> None:
    _, tokenizer, store = opened(folder)
    text = "fox over a lazy dog " * 9
    whole = read_prompt(text, tokenizer, store, None).ids
    named = argparse.Namespace(meta=argparse.Namespace(origin={"bos": 7}))
    with pytest.warns(UserWarning, match="the last 9 are read"):
        assert read_prompt(text, tokenizer, named, 10).ids == [7, *whole[-9:]]  # type: ignore[arg-type]
    named.meta.origin = None
    with pytest.warns(UserWarning, match="the last 10 are read"):
        assert read_prompt(text, tokenizer, named, 10).ids == whole[-10:]  # type: ignore[arg-type]


# Tokens and text


def test_special_tokens_spelled_out_are_text(run: Run, folder: Path) -> None:
    _, tokenizer, store = opened(folder)
    mark = tokenizer.bos_token
    ids = read_prompt(f"the {mark} fox", tokenizer, store, None).ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert run("generate", f"the {mark} fox")["tokens_given"] == len(ids)
    assert run("search", f"the {mark} fox")["tokens_given"] == len(ids)


def llama_like() -> Any:
    """A tokenizer that marks spaces and drops the first, with bytes for unknown characters."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    words = ["▁the", "▁quick", "▁brown", "▁fox", "▁", "f", "o", "x", "s"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {name: i for i, name in enumerate(names)}
    whole = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    whole.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    fast = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("length", [1, 3, 20])
def test_the_space_before_the_first_new_token(length: int) -> None:
    tokenizer = llama_like()
    word = tokenizer.convert_tokens_to_ids
    prompt = [1, *[word("▁the"), word("▁quick"), word("▁brown")] * length]
    assert pieces(tokenizer, [*prompt, word("▁fox"), word("s"), word("▁fox")], len(prompt)) == [
        " fox",
        "s",
        " fox",
    ]
    assert tokenizer.decode([word("▁fox")]) == "fox"  # what is lost when it is decoded alone


def test_characters_spread_over_tokens() -> None:
    tokenizer = llama_like()
    word = tokenizer.convert_tokens_to_ids
    fox = [word(f"<0x{byte:02X}>") for byte in "🦊".encode()]
    prompt = [1, word("▁the"), word("▁")]
    assert pieces(tokenizer, [*prompt, *fox, word("s")], 3) == ["", "", "", "🦊", "s"]
    assert pieces(tokenizer, [*prompt, *fox, *fox, 2], 3)[-2:] == ["🦊", ""]
    broken = pieces(tokenizer, [*prompt, word("f"), *fox[:2]], 3)
    assert broken[0] == "f" and "".join(broken[1:]).strip("\ufffd") == ""


def test_the_continuation_is_what_all_tokens_together_say(folder: Path) -> None:
    _, tokenizer, store = opened(folder)
    ids = read_prompt("the 漢字 🦊 quick é 🦊🦊 dog", tokenizer, store, None).ids
    for first in range(1, len(ids)):
        head = tokenizer.decode(ids[1:first], clean_up_tokenization_spaces=False)
        new = "".join(pieces(tokenizer, ids, first))
        if not head.endswith("\ufffd"):
            assert head + new == "the 漢字 🦊 quick é 🦊🦊 dog"


# What is said


def test_the_base_and_the_documents_stand_beside(run: Run, folder: Path) -> None:
    found = run("generate", "the quick brown", "--max-new-tokens", "6")
    mixed, tokenizer, store = opened(folder)
    ids = read_prompt("the quick brown", tokenizer, store, None).ids
    base = mixed.model.generate(
        torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0
    )[0].tolist()
    assert found["base_continuation"] == "".join(pieces(tokenizer, base, len(ids)))
    assert found["continuation"] == "".join(token["token"] for token in found["tokens"])
    whole = [*ids, *(token["id"] for token in found["tokens"])]
    with torch.no_grad():
        p = mixed(input_ids=torch.tensor([whole])).logits[0].exp()
        p_lm = mixed.model(input_ids=torch.tensor([whole])).logits[0].softmax(-1)
    names = set(store.document_names)
    for place, token in enumerate(found["tokens"], len(ids) - 1):
        assert token["p"] == pytest.approx(p[place, token["id"]].item(), rel=1e-4)
        assert token["p_lm"] == pytest.approx(p_lm[place, token["id"]].item(), rel=1e-4)
        assert token["p"] == pytest.approx(0.5 * token["p_lm"] + 0.5 * token["p_knn"], rel=1e-4)
        shares = [share for _, share in token["documents"]]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= token["p_knn"] + 1e-5
        assert {name for name, _ in token["documents"]} <= names
        assert bool(token["documents"]) == (token["p_knn"] > 0)
    assert any(token["documents"] for token in found["tokens"])


def test_a_documents_own_text_is_laid_at_its_door(run: Run) -> None:
    """All p_knn on the very row that the text comes from: one document has it all."""
    from knnext.datastore import Datastore
    from knnext.lm.load import load_lm

    run.mixture = ["--temperature", "1e-6", "--lmbda", "0.99", "--k", "4"]
    values = Datastore.open(run.folder / "store").values[:14].tolist()
    text = load_lm(run.model)[1].decode(values[:12], clean_up_tokenization_spaces=False)
    found = run("generate", text, "--max-new-tokens", "2")
    assert [token["id"] for token in found["tokens"]] == values[12:]
    for token in found["tokens"]:
        assert token["p_knn"] == pytest.approx(1, abs=1e-3)
        first, *others = token["documents"]
        assert first == ["0.txt", pytest.approx(1, abs=1e-3)]
        assert all(part < 1e-3 for _, part in others)  # farther rows of the same token


def test_the_lines_for_people(run: Run) -> None:
    assert main(run.words("generate", "the quick brown", "--max-new-tokens", "3")) == 0
    lines = run.capsys.readouterr().out
    assert lines.startswith("the quick brown") and "the base LM alone: " in lines
    assert "p_knn" in lines and ".txt" in lines
    words = run.words("generate", "the quick brown", "--max-new-tokens", "3", "--text-only")
    assert main(words) == 0
    assert lines.startswith(run.capsys.readouterr().out)
