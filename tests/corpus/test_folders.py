"""Any folder of text: which files are splits, which are read, and what is said of the others."""

from __future__ import annotations

import gzip
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from knnext.corpus import Corpus, CorpusError, CorpusNote, load_corpus


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def notes_folder(folder: Path, count: int = 60) -> Path:
    for i in range(count):
        write(folder / f"note {i}.txt", f"this is note {i}\n")
    return folder


def names(corpus: Corpus) -> set[str]:
    return {d.name for d in [*corpus.train, *corpus.valid, *corpus.test]}


def texts(corpus: Corpus) -> list[str]:
    return sorted(d.text for d in [*corpus.train, *corpus.valid, *corpus.test])


def notes_of(corpus: Corpus) -> str:
    return "\n".join(corpus.notes)


def load(folder: Path, **options: Any) -> Corpus:
    """Without the warnings, which repeat `notes`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CorpusNote)
        return load_corpus(str(folder), **options)


@pytest.mark.parametrize(
    "name",
    [
        "train timetable.txt",
        "test results.md",
        "dev-log.log",
        "val.d.isere.txt",
        "my-training.txt",
        "train.old.txt",
        "test_2.txt",
        "latest test",
        "wiki.train.tokens",  # one of its kind is no set of splits
        "tests/a.txt",
        "train set/a.txt",
    ],
)
def test_what_is_named_a_little_like_a_split_is_none(tmp_path: Path, name: str) -> None:
    write(notes_folder(tmp_path) / name, "one among many\n")
    corpus = load(tmp_path)
    assert len(names(corpus)) == 61 and name in names(corpus)
    assert corpus.notes == ()


@pytest.mark.parametrize("name", ["train.txt", "train", "Training.md", "train/a.txt"])
def test_what_lies_beside_splits_is_named(tmp_path: Path, name: str) -> None:
    notes_folder(tmp_path, 9)
    for i in range(40):
        write(tmp_path / "train" / f"{i}.txt", f"text {i}") if "/" in name else None
    write(tmp_path / name, "\f".join(f"text {i}\n" for i in range(40)))
    with pytest.warns(CorpusNote, match=r"9 others beside them are not read: note 0\.txt, .* more"):
        corpus = load_corpus(str(tmp_path))
    assert not any(name.startswith("note") for name in names(corpus))
    assert not any("note" in d.text for d in corpus.train)


@pytest.mark.parametrize("name", ["test.txt", "dev/a.txt", "validation"])
def test_a_split_without_train_says_what_is_wanted(tmp_path: Path, name: str) -> None:
    write(notes_folder(tmp_path) / name, "held out\n")
    with pytest.raises(CorpusError, match=r"has .*is a split, but nothing named 'train'"):
        load(tmp_path)


def test_every_text_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    notes_folder(tmp_path)
    for name in ("run.log", "README", "Makefile", "conf.yaml", "old.BAK", "a/b.vim", "x.log.gz"):
        text = f"what {name} says\n".encode()
        write(tmp_path / name, gzip.compress(text) if name.endswith(".gz") else text)
        assert text.decode() in texts(load(tmp_path)), name


def test_what_is_not_read_is_counted_and_named(tmp_path: Path) -> None:
    notes_folder(tmp_path)
    write(tmp_path / "a.png", b"\x89PNG\r\n\x1a\n\0\0")
    write(tmp_path / "b.weights", b"\0" * 100)
    write(tmp_path / "c.txt", b"plain until \0 here")
    write(tmp_path / "paper.pdf", b"%PDF-1.7\nascii")
    write(tmp_path / "latin.unknown", "é".encode("latin-1"))
    write(tmp_path / ".git" / "HEAD", "ref")
    write(tmp_path / "sub" / ".hidden", "x")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    corpus = load(tmp_path)
    assert len(names(corpus)) == 60
    note = notes_of(corpus)
    assert "4 binary (a.png, b.weights, c.txt and 1 more)" in note
    assert "1 not UTF-8 (latin.unknown)" in note
    assert "2 hidden (.git, sub/.hidden)" in note
    assert "1 unreadable (gone.txt" in note


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_of_someone_else_is_passed_over(tmp_path: Path) -> None:
    write(notes_folder(tmp_path) / "secret.txt", "x")
    (tmp_path / "secret.txt").chmod(0)
    assert "1 unreadable (secret.txt" in notes_of(load(tmp_path))


def test_links_to_folders_are_followed_and_circles_cut(tmp_path: Path) -> None:
    folder = notes_folder(tmp_path / "corpus")
    write(tmp_path / "elsewhere" / "far.txt", "far away\n")
    write(folder / "sub" / "near.txt", "near by\n")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "a-second-way").symlink_to(folder / "sub")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "file-link.txt").symlink_to(tmp_path / "single.txt")
    write(tmp_path / "single.txt", "a file\n")
    corpus = load(folder)
    assert {"linked/far.txt", "sub/near.txt", "file-link.txt"} <= names(corpus)
    assert len(names(corpus)) == 63  # nothing twice
    for split in ("train", "test"):
        (tmp_path / "splits" / split).parent.mkdir(exist_ok=True)
        target = folder if split == "train" else tmp_path / "elsewhere2"
        (tmp_path / "splits" / split).symlink_to(target)
    write(tmp_path / "elsewhere2" / "t.txt", "the test\n")
    assert [d.text for d in load(tmp_path / "splits").test] == ["the test\n"]


@pytest.mark.parametrize(
    "files",
    [
        ("store/keys-00000.bin", "store/values-00000.bin", "store/document-names.jsonl"),
        ("gpt2/tokenizer.json", "gpt2/config.json", "gpt2/merges.txt"),
        ("out/demo.json", "out/training.json", "out/report.html"),
        ("knnext-experiments/report.md",),
        ("exp/report.html", "exp/cache/tokenizer/1/merges.txt"),
    ],
)
def test_what_was_made_of_a_corpus_is_no_part_of_it(tmp_path: Path, files: tuple[str, ...]) -> None:
    notes_folder(tmp_path)
    before = load(tmp_path).facts("train")
    for name in files:
        write(tmp_path / name, '"a"\n"b"\n')
    corpus = load(tmp_path)
    assert corpus.facts("train") == before
    assert f"1 a datastore, a model or results ({files[0].split('/')[0]})" in notes_of(corpus)


# JSON and notebooks


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.json", [{"text": "one"}, {"text": "two"}], ["one", "two"]),
        ("a.json", ["one", "two"], ["one", "two"]),
        ("a.json", {"text": "one", "id": 7}, ["one"]),
        ("a.json", {"data": [{"text": "one"}, {"text": "two"}], "n": [1]}, ["one", "two"]),
        ("a.json", {"text": ["one", "two"], "title": ["A", "B"]}, ["one", "two"]),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("a.ndjson", '{"text": "one"}\n"two"\n', ["one", "two"]),
        (
            "a.ipynb",
            {
                "cells": [
                    {"cell_type": "markdown", "source": ["# One\n", "more"]},
                    {"cell_type": "code", "source": "x = 1", "outputs": ["no text"]},
                ]
            },
            ["# One\nmore\n\nx = 1\n"],
        ),
        (
            "old.ipynb",
            {"worksheets": [{"cells": [{"source": "one"}, {"input": ["t", "wo"]}]}]},
            ["one\n\ntwo\n"],
        ),
    ],
)
def test_json_has_its_texts(tmp_path: Path, name: str, content: Any, wanted: list[str]) -> None:
    write(tmp_path / name, content if isinstance(content, str) else json.dumps(content))
    assert texts(load(tmp_path / name, shares=(100, 0, 0))) == sorted(wanted)
    corpus = notes_folder(tmp_path / "folder")
    write(corpus / name, (tmp_path / name).read_bytes())
    assert set(wanted) <= set(texts(load(corpus)))
    write(corpus / "packed" / f"{name}.gz", gzip.compress((tmp_path / name).read_bytes()))
    (corpus / name).unlink()
    assert set(wanted) <= set(texts(load(corpus)))


def test_json_without_text_is_no_part_of_a_folder_and_an_error_alone(tmp_path: Path) -> None:
    write(notes_folder(tmp_path) / "package.json", json.dumps({"name": "x", "version": "1"}))
    corpus = load(tmp_path)
    assert len(names(corpus)) == 60 and "JSON without a 'text' (package.json)" in notes_of(corpus)
    with pytest.raises(CorpusError, match=r"no text under 'text'; it has name, version"):
        load(tmp_path / "package.json")


# What is no text


def lines(bad: str) -> str:
    good = [json.dumps({"text": f"text {i}"}) for i in range(2000)]
    good[1234] = bad
    return "\n".join(good)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"text": "half a pair: \\ud83d"}', r"line 1235, character 14: lone surrogate U\+D83D"),
        ('{"text": "a", oops', r"line 1235 is not JSON"),
        ('{"body": "a"}', r"line 1235 has no text under 'text'"),
        ('{"text": 5}', r"line 1235 has no text under 'text'"),
        ("[]", r"line 1235 has no text"),
    ],
)
def test_a_bad_row_is_named_and_can_be_read_past(tmp_path: Path, bad: str, message: str) -> None:
    write(tmp_path / "rows.jsonl", lines(bad))
    with pytest.raises(CorpusError, match=rf"rows\.jsonl, {message}.*errors='replace'"):
        load(tmp_path / "rows.jsonl")
    corpus = load(tmp_path / "rows.jsonl", errors="replace")
    if "surrogate" in message:
        assert "half a pair: \ufffd" in texts(corpus) and len(names(corpus)) == 2000
    else:
        assert len(names(corpus)) == 1999 and "1 rows have no text, left out: line 1235" in (
            notes_of(corpus)
        )


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", lines('{"text": "\\ud83d\\ude00"}'))
    assert "😀" in texts(load(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("name", ["bad.txt", "bad.log", "bad.md", "bad.jsonl"])
def test_a_byte_that_is_not_utf8_is_placed(tmp_path: Path, name: str) -> None:
    write(notes_folder(tmp_path) / name, b"\xef\xbb\xbf" + b'{"text": "fine"}\n' * 41 + b'"\xe9"\n')
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CorpusError, match=rf"{name}, line 42: byte 0xe9 is not UTF-8"):
            load(path)
    assert any("\ufffd" in text for text in texts(load(tmp_path, errors="replace")))


def test_utf16_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text".encode("utf-16"))
    with pytest.raises(CorpusError, match="UTF-16"):
        load(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="errors must be one of"):
        load(tmp_path / "a.txt", errors="ignore")


# Shares, few documents, copies


def test_six_files_are_divided(tmp_path: Path) -> None:
    notes_folder(tmp_path, 6)
    for seed in range(8):
        corpus = load(tmp_path, seed=seed)
        sizes = [len(corpus.split(s)) for s in ("train", "valid", "test")]
        assert sum(sizes) == 6 and min(sizes) >= 1
        assert corpus == load(tmp_path, seed=seed)
    assert any("too few" in notes_of(load(tmp_path, seed=seed)) for seed in range(8))


def test_shares(tmp_path: Path) -> None:
    notes_folder(tmp_path, 300)
    half = load(tmp_path, shares=(1, 0.5, 0.5))
    assert 110 < len(half.train) < 190 and 40 < len(half.valid) < 110
    assert half.shares == (50, 25, 25)
    whole = load(tmp_path, shares=(1, 0, 0))
    assert len(whole.train) == 300 and not whole.valid and not whole.test
    assert {d.name for d in load(tmp_path).test} == {d.name for d in load(tmp_path, seed=0).test}
    assert load(tmp_path, shares=[80, 10, 10]) == load(tmp_path)


@pytest.mark.parametrize("shares", [(1, 2), (0, 1, 1), (1, -1, 1), (0, 0, 0), (float("nan"), 1, 1)])
def test_bad_shares(tmp_path: Path, shares: Any) -> None:
    with pytest.raises(ValueError, match="shares must"):
        load(notes_folder(tmp_path), shares=shares)


def test_copies_stay_in_one_split(tmp_path: Path) -> None:
    notes_folder(tmp_path, 100)
    for i in range(50):
        write(
            tmp_path / f"sub{i}" / "LICENSE", "Permission is hereby granted  \r\nto any person.\n"
        )
    corpus = load(tmp_path)
    hashes = [{d.content_hash for d in corpus.split(s)} for s in ("train", "valid", "test")]
    assert not hashes[0] & hashes[1] and not hashes[0] & hashes[2] and not hashes[1] & hashes[2]
    assert "of test repeat the text of another split and were left out of test" in notes_of(corpus)
    assert sum(d.name.endswith("LICENSE") for d in corpus.train) > 30


def test_a_published_test_split_keeps_what_it_has(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "a\fb\fsame\fc\n")
    write(tmp_path / "valid.txt", "d\fsame\n")
    write(tmp_path / "test.txt", "same\fe\n")
    corpus = load(tmp_path)
    assert [d.text.strip() for d in corpus.test] == ["same", "e"]
    assert [d.text.strip() for d in corpus.valid] == ["d"]
    assert [d.text.strip() for d in corpus.train] == ["a", "b", "c"]
    assert notes_of(corpus).count("left out of") == 2


# What identifies a text


def test_facts_follow_the_text_and_not_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes_folder(tmp_path / "notes")
    monkeypatch.chdir(tmp_path)
    here, there = load_corpus("notes"), load_corpus(str(tmp_path / "notes"))
    assert here.facts("train") == there.facts("train")
    assert here.facts("train").corpus == str(tmp_path / "notes")
    assert here.facts("train").documents != here.facts("test").documents
    before = here.facts("train").documents
    name = here.train[0].name
    write(tmp_path / "notes" / name, "edited")
    assert load_corpus("notes").facts("train").documents != before


def test_a_hash_sees_through_spaces_and_line_ends() -> None:
    from knnext.corpus import Document

    one = Document("a", "def f():\r\n\treturn 1\n")
    assert one.content_hash == Document("b", "def f():\n    return 1").content_hash
    assert one.content_hash != Document("a", "def f():\n    return 2").content_hash
    assert len(one.content_hash) == 16 and one == Document("a", "def f():\r\n\treturn 1\n")


def test_two_files_of_many_that_differ_in_a_split_word_are_no_splits(tmp_path: Path) -> None:
    notes_folder(tmp_path)
    for name in ("steam.train.txt", "steam.test.txt"):
        write(tmp_path / name, f"{name} is a note\n")
    assert len(names(load(tmp_path))) == 62


@pytest.mark.parametrize("split", ["valid.txt", "TEST.TXT", "dev.md"])
def test_splits_that_lack_one_say_which_files_they_left_out(tmp_path: Path, split: str) -> None:
    for name in ("train.txt", split):
        write(notes_folder(tmp_path) / name, f"{name} has one document\n")
    with pytest.raises(CorpusError, match=r"its splits are .*60 others beside them are not read"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["train.txt", "valid.txt", "train.txt.gz", "note.txt", "train"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    write(notes_folder(tmp_path) / "a.txt", "a text\n")
    os.mkfifo(tmp_path / name)
    if name in ("note.txt", "train"):
        assert "no regular file" in notes_of(load(tmp_path))
    else:
        with pytest.raises(CorpusError, match=r"no regular file|nothing named 'train'"):
            load(tmp_path)


def test_a_row_with_the_id_0_is_named_by_it(tmp_path: Path) -> None:
    rows = [json.dumps({"id": i, "text": f"row {i}"}) for i in range(30)]
    write(tmp_path / "rows.jsonl", "\n".join(rows))
    assert names(load(tmp_path)) == {str(i) for i in range(30)}
