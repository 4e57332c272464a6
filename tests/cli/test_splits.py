"""The split is a fact of the datastore: kept, used again, and nothing that is stored is scored."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnext.cli import main

WORDS = "the a row key value state of next token near far text model and store".split()  # noqa: SIM905
MIXTURE = ["--temperature", "1", "--lmbda", "0.2", "--k", "8"]


def write_notes(folder: Path, count: int, *, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        lines = (" ".join(rng.choice(WORDS, 12)) + ".\n" for _ in range(3))
        (folder / f"{number}.txt").write_text(f"Document {number}.\n" + "".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model: what it thinks of the text is not the question here."""
    transformers = pytest.importorskip("transformers")
    from knnext.corpus import Document
    from knnext.lm.load import save_lm
    from knnext.lm.train import train_tokenizer

    folder = tmp_path_factory.mktemp("splits")
    tokenizer = train_tokenizer([Document("a", " ".join(WORDS) * 50)], 290)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(
        vocab_size=290,
        **sizes,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    save_lm(folder / "model", transformers.GPT2LMHeadModel(config), tokenizer)
    return folder / "model"


class Place:
    """A folder with `notes/` and a model; runs commands there and gives their JSON and words."""

    def __init__(self, folder: Path, model: Path, capsys: Any) -> None:
        self.folder, self.capsys = folder, capsys
        self.model = ["--model", str(model), "--device", "cpu"]
        self.words = ""

    def __call__(self, command: str, store: str, *words: str, fails: str | None = None) -> Any:
        self.capsys.readouterr()
        options = self.model + (MIXTURE if command == "eval" else [])
        code = main([command, store, *words, *options, "--json"])
        out, self.words = self.capsys.readouterr()
        assert code == (0 if fails is None else 1), self.words
        if fails is not None:
            assert fails in self.words and "Traceback" not in self.words, self.words
            return None
        return json.loads(out)


@pytest.fixture
def place(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Place:
    write_notes(tmp_path / "notes", 60)
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, model, capsys)


def scored(place: Place, *words: str) -> set[str]:
    place("eval", "store", *words, "--token-log", "log.jsonl")
    rows = map(json.loads, Path("log.jsonl").read_text().splitlines())
    return {row["document"] for row in rows}


def stored_names(store: str = "store") -> set[str]:
    from knnext.datastore import Datastore

    return set(Datastore.open(store).document_names)


def test_the_split_of_the_build_is_the_split_of_the_evaluation(place: Place) -> None:
    built = place("build", "store", "--corpus", "notes", "--split-seed", "7")
    assert built["text"]["seed"] == 7 and built["text"]["corpus"] == str(place.folder / "notes")
    names = scored(place)
    assert names and not names & stored_names()
    tuned = place("tune", "store", "--k", "8", "--temperatures", "1,2", "--lmbdas", "0,0.2")
    assert tuned["k"] == 8
    # Said again it is no other, and another is.
    assert scored(place, "--split-seed", "7", "--shares", "8,1,1") == names
    for words in (("--split-seed", "3"), ("--shares", "60,20,20")):
        for command in ("eval", "tune"):
            place(command, "store", *words, fails="--allow-overlap")
    assert "built" not in place.words
    assert scored(place, "--split-seed", "3", "--allow-overlap") & stored_names()


def test_what_is_stored_is_not_scored(place: Place) -> None:
    place("build", "store", "--corpus", "notes", "--split-seed", "7")
    count = len(stored_names())
    for words in (
        ("--split", "train"),
        ("--split", "train", "--document-tokens", "12"),
    ):
        place("eval", "store", *words, fails=f"{count} of the {count} documents to be scored")
    # A copy under another name is the same text; so is one of other names and line ends.
    shutil.copytree("notes", "copy")
    for path in list(Path("copy").iterdir()):
        path.rename(path.with_name(f"renamed {path.name}"))
    for path in Path("copy").iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    for command in ("eval", "tune"):
        words = ("--corpus", "copy", "--split-seed", "3")
        place(command, "store", *words, fails="documents to be scored are in the datastore")
    place("eval", "store", "--corpus", "copy", "--split-seed", "3", "--allow-overlap")
    # Another text of the same names is another text.
    write_notes(place.folder / "other", 60, seed=1)
    for path in Path("other").iterdir():
        path.write_text(path.read_text().replace("Document", "Other document"))
    assert scored(place, "--corpus", "other", "--split-seed", "3")


def test_a_whole_corpus_without_splits_leaves_nothing_to_score(place: Place) -> None:
    place("build", "store", "--corpus", "notes", "--shares", "100,0,0")
    assert len(stored_names()) == 60
    place("eval", "store", fails="no test split with shares 100,0,0")
    place("eval", "store", "--shares", "80,10,10", fails="--allow-overlap")


def test_capped_builds_and_their_rest(place: Place) -> None:
    place("build", "store", "--corpus", "notes", "--max-bytes", "4000")
    assert 5 < len(stored_names()) < 25
    assert not scored(place) & stored_names()
    assert "changed" not in place.words
    place("eval", "store", "--split", "train", fails="are in the datastore")


@pytest.mark.parametrize("kind", ["store", "merged", "sampled"])
def test_a_relative_corpus_is_found_from_anywhere(
    place: Place, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from knnext.datastore import Datastore

    place("build", "store", "--corpus", "notes", "--split-seed", "7")
    if kind == "merged":
        Datastore.merge([Datastore.open("store")], "merged")
    elif kind == "sampled":
        Datastore.open("store").subsample(0.5, path="sampled")
    names = scored(place)
    write_notes(place.folder / "away" / "notes", 60, seed=2)
    monkeypatch.chdir(place.folder / "away")
    place("eval", f"../{kind}", "--token-log", "log.jsonl")
    rows = map(json.loads, Path("log.jsonl").read_text().splitlines())
    assert {row["document"] for row in rows} == names


def test_a_changed_text_is_said(place: Place) -> None:
    place("build", "store", "--corpus", "notes")
    place("eval", "store")
    assert "changed" not in place.words
    name = sorted(stored_names())[0]
    before = Path("notes", name).read_text()
    Path("notes", name).write_text("Quite another text in its place.\n")
    place("eval", "store")
    assert f"note: {place.folder / 'notes'} has changed since the datastore was built" in (
        place.words
    )
    place("build", "store", "--corpus", "notes", fails="its documents have changed since then")
    # An edit of what is stored does not get it past the comparison under another division.
    Path("notes", name).write_text(before.replace("Document", "Documents") + "One line more.\n")
    shutil.copytree("notes", "copy")
    place("eval", "store", "--corpus", "copy", "--split", "train", fails=name)


def test_another_split_is_not_mixed_into_a_build(place: Place) -> None:
    place("build", "store", "--corpus", "notes", "--split-seed", "7")
    place("build", "store", "--corpus", "notes", fails="seed: datastore has 7, asked for 0")
    place("build", "store", "--corpus", str(place.folder / "notes"), "--split-seed", "7")


def test_stores_of_before_are_compared_too(place: Place) -> None:
    """As an older knnext left them: no facts of the split, no hashes, the corpus as typed."""
    from dataclasses import replace

    from knnext.datastore.meta_file import read_finished, to_json

    place("build", "store", "--corpus", "notes", "--split-seed", "7")
    meta = read_finished(Path("store"))
    documents = replace(meta.documents, hashes=None)
    old = replace(meta, text=None, documents=documents, corpus="notes")
    Path("store", "meta.json").write_bytes(to_json(old))
    Path("store", "document-hashes.bin").unlink()
    place("eval", "store", fails="are in the datastore")
    assert "names its corpus as 'notes', and not from which folder" in place.words
    place("eval", "store", "--split-seed", "7")
    shutil.copytree("notes", "copy")
    for path in list(Path("copy").iterdir()):
        path.rename(path.with_name(f"renamed {path.name}"))
    place("eval", "store", "--corpus", "copy", "--split", "train", fails="are in the datastore")
    assert place("build", "store", "--corpus", "notes", "--split-seed", "7")["text"] is None


def test_six_files_do(place: Place) -> None:
    write_notes(place.folder / "six", 6)
    place("build", "store", "--corpus", "six")
    assert "too few to be divided by hash alone" in place.words or len(stored_names()) < 6
    assert len(scored(place)) >= 1


def test_tokens_are_counted_alike(place: Place) -> None:
    built = place("build", "store", "--corpus", "notes")
    assert f"{built['num_entries']:,} tokens to store" in place.words
    found = place("eval", "store")
    assert f"test: {found['num_tokens']:,} tokens of" in place.words


def test_a_missing_datastore_is_what_is_missing(place: Place, capsys: Any) -> None:
    assert main(["eval", "nowhere", *place.model]) == 1
    assert "nowhere: not a datastore: the folder does not exist" in capsys.readouterr().err


def test_outputs_are_tried_before_the_work(place: Place) -> None:
    place("build", "store", "--corpus", "notes")
    for option in ("--token-log", "--save-scores"):
        place("eval", "store", option, "no/such/folder/x.jsonl", fails="no/such/folder/x.jsonl")
        assert "tokens of" not in place.words
    place("tune", "store", "--out", "no/such/folder/x.jsonl", fails="no/such/folder/x.jsonl")


# bos


def test_bos_in_each_window_is_kept_and_used_again(place: Place) -> None:
    plain = place("build", "plain", "--corpus", "notes", "--block-size", "16", "--stride", "8")
    words = ("--corpus", "notes", "--block-size", "16", "--stride", "8", "--bos-each-window")
    built = place("build", "store", *words)
    assert built["origin"]["bos"] == 0 and "bos" not in plain["origin"]
    windows = ("--block-size", "16", "--stride", "8")
    as_built = place("eval", "store", *windows)["base"]["nll"]
    assert place("eval", "store", *windows, "--bos-each-window")["base"]["nll"] == as_built
    without = place("eval", "store", *windows, "--no-bos-each-window")["base"]["nll"]
    assert without != as_built and without == place("eval", "plain", *windows)["base"]["nll"]
    words = ("--corpus", "notes", "--block-size", "16", "--stride", "16", "--bos-each-window")
    place("build", "other", *words, fails="stride must be below block_size=16")


# What is no text


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


@pytest.mark.parametrize("command", ["search", "generate"])
def test_a_byte_on_stdin_that_is_not_utf8_is_placed(place: Place, stdin: Any, command: str) -> None:
    place("build", "store", "--corpus", "notes")
    short = [*MIXTURE, "--max-new-tokens", "4"]
    words = short if command == "generate" else ["--k", "3"]
    stdin(b"the model\nof a \xff token")
    message = "stdin, line 2: byte 0xff is not UTF-8; --text-errors replace"
    place(command, "store", "-", *words, fails=message)
    stdin(b"the model\nof a \xff token")
    place(command, "store", "-", *words, "--text-errors", "replace")
    place(command, "store", "of a \udcff token", *words, fails="lone surrogate U+DCFF")
    place(command, "store", "of a \udcff token", *words, "--text-errors", "replace")


def test_a_bad_row_of_a_corpus_is_placed(place: Place) -> None:
    rows = [json.dumps({"text": f"the text of row {i}"}) for i in range(60)]
    rows[40] = '{"text": "half \\udc00"}'
    Path("rows.jsonl").write_text("\n".join(rows))
    words = ("--corpus", "rows.jsonl")
    place("build", "store", *words, fails="rows.jsonl, line 41, character 6: lone surrogate")
    place("build", "store", *words, "--text-errors", "replace")
    place("eval", "store")  # reads as the build did


@pytest.mark.parametrize("shares", ["1,2", "0,1,1", "a,b,c", "1,-1,0", "nan,1,1"])
def test_wrong_shares_are_wrong_usage(shares: str, capsys: Any) -> None:
    assert main(["eval", "store", "--shares", shares]) == 2
    assert "as 80,10,10" in capsys.readouterr().err


# Documents one by one


def test_documents_are_read_as_the_datastore_was_built(place: Place) -> None:
    windows = ("--block-size", "16", "--stride", "8")
    built = place("build", "store", "--corpus", "notes", "--separate-documents", *windows)
    assert built["origin"]["separate_documents"] is True
    assert "each document alone, in windows of up to 16 tokens, 8 apart" in place.words
    as_built = place("eval", "store", *windows)
    assert "each document alone" in place.words and "note: the datastore" not in place.words
    same = place("eval", "store", "--separate-documents", *windows)
    assert same["base"] == as_built["base"]
    other = place("eval", "store", "--no-separate-documents", *windows)
    assert "built from each document alone, and this reads documents as one" in place.words
    # 6 documents to score: with the marks between them, and with what stands before
    assert other["num_tokens"] == as_built["num_tokens"] + other["num_documents"] - 1
    assert other["base"]["nll"] != as_built["base"]["nll"]
    message = "separate_documents: datastore has True, asked for None"
    place("build", "store", "--corpus", "notes", *windows, fails=message)


def test_what_is_read_is_said(place: Place) -> None:
    place("build", "store", "--corpus", "notes")
    assert "windows of up to 32 tokens, 24 apart: the model reads each token 1.3" in place.words
    place("eval", "store")
    assert "windows of up to 32 tokens, 16 apart: the model reads each token 1.9" in place.words
    place("eval", "store", "--stride", "32", "--full-last-window")
    assert "32 apart: the model reads each token 1.0" in place.words


def test_words_are_counted_as_asked(place: Place) -> None:
    place("build", "store", "--corpus", "notes")
    found = {
        words: place("eval", "store", "--separate-documents", "--words", words)["num_words"]
        for words in ("marks", "wikitext", "harness")
    }
    plain = place("eval", "store")
    documents = plain["num_documents"]
    assert plain["num_words"] == found["marks"] + documents - 1
    assert found["wikitext"] == found["marks"] + 4 * documents  # four lines each
    assert found["harness"] == found["marks"] + documents  # and nothing, behind the last line


def test_what_was_kept_cannot_be_read_in_another_way(place: Place) -> None:
    place("build", "store", "--corpus", "notes")
    kept = ("--scores", "scores.npz")
    found = place("eval", "store", "--words", "harness", "--save-scores", "scores.npz")
    assert place("eval", "store", *kept)["base"] == found["base"]
    assert place("eval", "store", *kept, "--words", "harness")["num_words"] == found["num_words"]
    place("eval", "store", *kept, "--words", "marks", fails="were counted as 'harness'")
    for option in ("--separate-documents", "--no-separate-documents", "--full-last-window"):
        message = "scores.npz keeps how it was read"
        place("eval", "store", *kept, option, fails=message)
        place("tune", "store", *kept, option, fails=message)
