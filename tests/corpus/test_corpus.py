"""Corpora: where documents begin, which split they are in, and their tokens."""

from __future__ import annotations

import gzip
import json
import lzma
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnext.corpus import (
    CorpusError,
    Document,
    TokenizedDocuments,
    load_corpus,
    separator_token,
    tokenize,
)
from knnext.corpus.documents import cap_bytes, name_hash, split_by_hash
from knnext.corpus.stdlib import stdlib_documents

ARTICLES = "".join(
    f"\n = Title {i} = \n\n text of {i} \n = = Section = = \n more\n" for i in range(4)
)


def names(documents: list[Document]) -> list[str]:
    return [d.name for d in documents]


def everything(corpus: Any) -> list[Document]:
    return [*corpus.train, *corpus.valid, *corpus.test]


# The embedded corpus


def test_stdlib_is_divided_and_stays_divided() -> None:
    corpus, again = load_corpus("stdlib"), load_corpus("stdlib")
    assert corpus == again
    assert min(len(corpus.train), len(corpus.valid), len(corpus.test)) > 20
    every = names(everything(corpus))
    assert len(set(every)) == len(every)
    assert sum(d.num_bytes for d in corpus.train) > 2_000_000
    assert load_corpus("stdlib", seed=1).test != corpus.test


def test_stdlib_leaves_out_tests_vendored_parts_and_tables() -> None:
    documents = stdlib_documents()
    for name in names(documents):
        parts = name.split("/")[:-1]
        assert not {"test", "tests", "idle_test", "site-packages", "_vendor", "encodings"} & set(
            parts
        )
    assert "html/entities.py" not in names(documents)
    assert "argparse.py" in names(documents)
    for document in documents:
        lines = [line for line in document.text.splitlines() if line.strip()]
        numbers = sum(line.strip()[0] in "'\"0123456789(" for line in lines)
        assert len(lines) < 60 or numbers < 0.6 * len(lines), document.name


def test_stdlib_topics_do_not_repeat_each_other() -> None:
    topics = [d for d in stdlib_documents() if d.name.startswith("topics/")]
    if not topics:
        pytest.skip("this Python has no pydoc topics")
    sets = [{p.strip() for p in d.text.split("\n\n") if p.strip()} for d in topics]
    paragraphs = [paragraph for of_one in sets for paragraph in of_one]
    assert len(set(paragraphs)) == len(paragraphs)
    assert len(topics) > 20


def fake_library(folder: Path, count: int, lines: int = 700) -> Path:
    for i in range(count):
        body = "\n".join(f"def function_{i}_{j}(argument): return argument" for j in range(lines))
        (folder / f"module_{i}.py").write_text(body)
    return folder


def test_stdlib_elsewhere_drops_copies_tests_and_the_unreadable(tmp_path: Path) -> None:
    fake_library(tmp_path, 70)
    (tmp_path / "copy.py").write_text((tmp_path / "module_3.py").read_text()[:-900])
    (tmp_path / "table.py").write_text("\n".join(f"    {i}: 'x{i}'," for i in range(200)))
    (tmp_path / "broken.py").write_bytes(b"# coding: utf-8\n\xff\xfe")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\nname = '\xe9'\n")
    for name in ("test", "site-packages", "config-3.12"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text("x = 1\n")
    documents = stdlib_documents(tmp_path)
    assert names(documents) == sorted(["latin.py", *(f"module_{i}.py" for i in range(70))])
    assert "é" in documents[0].text


def test_stdlib_too_small_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"only 3 usable source files .*another Python, or give"):
        stdlib_documents(fake_library(tmp_path, 3))


def test_stdlib_is_that_of_the_base_python_in_a_venv() -> None:
    assert Path(sysconfig.get_path("stdlib"), "argparse.py").is_file()


# Files and folders


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    packed = {".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, bytes)(data)
    path.write_bytes(packed)


@pytest.mark.parametrize(
    "files",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("train.txt.xz", "valid.txt.gz", "test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("train/a.md", "dev/b.md", "test/c.rst"),
        ("Training.txt", "validation.txt", "test.py"),
        ("train-00000-of-00001.txt", "val", "test.log"),
    ],
)
def test_folder_with_named_splits(tmp_path: Path, files: tuple[str, ...]) -> None:
    for file, word in zip(files, ("one", "two", "three"), strict=True):
        write(tmp_path / file, f"{word}\n")
    write(tmp_path / "README.md", "not part of it\n")
    write(tmp_path / ".hidden-train.txt", "nor this\n")
    (tmp_path / "train.bin").write_bytes(b"\xff\x00")
    corpus = load_corpus(str(tmp_path))
    texts = [[d.text for d in s] for s in (corpus.train, corpus.valid, corpus.test)]
    assert texts == [["one\n"], ["two\n"], ["three\n"]]


def test_headings_begin_documents(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(tmp_path / f"{split}.txt", ARTICLES)
    corpus = load_corpus(str(tmp_path))
    assert names(corpus.train) == ["Title 0", "Title 1", "Title 2", "Title 3"]
    assert "".join(d.text for d in corpus.train) == ARTICLES.lstrip("\n")
    assert "= = Section = =" in corpus.train[2].text


def test_an_equation_is_no_heading(tmp_path: Path) -> None:
    text = "intro\n= not after an empty line =\n\n= = level two = =\n\n= only one =\n\nend\n"
    write(tmp_path / "a.txt", text)
    for i in range(60):
        write(tmp_path / f"b{i}.txt", "x")
    assert text in [d.text for d in everything(load_corpus(str(tmp_path)))]


@pytest.mark.parametrize("mark", ["<|endoftext|>\n", "\f"])
def test_marks_between_documents(tmp_path: Path, mark: str) -> None:
    write(tmp_path / "all.txt", mark.join(f"text {i}\n" for i in range(60)))
    corpus = load_corpus(str(tmp_path / "all.txt"))
    assert sorted(d.text for d in everything(corpus)) == sorted(f"text {i}\n" for i in range(60))
    assert "all.txt#01" in names(everything(corpus))


def test_a_long_file_without_marks_is_cut_at_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i} " + "word " * 100 for i in range(2000)]
    write(tmp_path / "book.txt.gz", "\n\n".join(paragraphs))
    documents = everything(load_corpus(str(tmp_path / "book.txt.gz")))
    documents.sort(key=lambda d: d.name)
    assert "".join(d.text for d in documents) == "\n\n".join(paragraphs)
    assert all(d.text.startswith("paragraph ") for d in documents)
    assert all(16_000 < d.num_bytes < 18_000 for d in documents[:-1])


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"content": f"text {i}", "title": f"T{i % 55}"} for i in range(60)]
    write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    corpus = load_corpus(str(tmp_path / "rows.jsonl"), text_column="content")
    assert len(set(names(everything(corpus)))) == 60
    assert "T1~2" in names(everything(corpus))
    with pytest.raises(CorpusError, match="line 1 has no text under 'text'"):
        load_corpus(str(tmp_path / "rows.jsonl"))


def test_missing_splits_come_out_of_train(tmp_path: Path) -> None:
    for i in range(200):
        write(tmp_path / "train" / f"{i}.txt", f"train {i}")
    write(tmp_path / "test.txt", "the test")
    corpus = load_corpus(str(tmp_path))
    assert [d.text for d in corpus.test] == ["the test"]
    assert 5 < len(corpus.valid) < 40
    assert len(corpus.train) + len(corpus.valid) == 200


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nothing", "no file or folder"),
        (lambda p: (write(p / "a.txt", "x"), p)[1], "1 documents and none for"),
        (lambda p: (write(p / "test.txt", "x"), p)[1], "nothing named 'train'"),
        (lambda p: ((p / "a.txt").write_bytes(b"\xff\xfe\xff"), p / "a.txt")[1], "not UTF-8"),
        (lambda p: ((p / "a.txt.xz").write_bytes(b"no xz"), p / "a.txt.xz")[1], "cannot be read"),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        load_corpus(str(make(tmp_path)))


# The rules of division


def test_a_new_document_moves_no_other() -> None:
    documents = [Document(f"d{i}", "x") for i in range(300)]
    before = split_by_hash(documents, 0)
    after = split_by_hash([*documents, Document("new", "x")], 0)
    for split, members in before.items():
        assert set(members) <= set(after[split])
    assert 200 < len(before["train"]) < 280
    assert name_hash("d1", 0) != name_hash("d1", 1)


def test_cap_keeps_whole_documents_in_order() -> None:
    documents = [Document(f"d{i}", "é" * (i + 1)) for i in range(50)]
    kept = cap_bytes(documents, 600, seed=0)
    assert 400 < sum(d.num_bytes for d in kept) <= 600
    assert kept == [d for d in documents if d in kept]
    assert kept != cap_bytes(documents, 600, seed=1)
    with pytest.raises(CorpusError, match="the smallest has 2 bytes"):
        cap_bytes(documents, 1, seed=0)
    with pytest.raises(ValueError, match="must be positive"):
        cap_bytes(documents, 0, seed=0)


# Hugging Face datasets, offline


def test_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {
        "train": [{"body": f"text {i}", "title": f"T{i}"} for i in range(5)],
        "validation": [{"body": "v", "title": "V"}, {"body": " ", "title": "blank"}],
        "test": [{"body": "t", "title": "S"}],
    }
    loaded = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(loaded).save_to_disk(str(tmp_path / "set"))
    corpus = load_corpus(f"hf:{tmp_path / 'set'}", text_column="body")
    assert names(corpus.train) == ["T0", "T1", "T2", "T3", "T4"]
    assert corpus.valid == [Document("V", "v")]
    with pytest.raises(CorpusError, match="text_column='text' is none"):
        load_corpus(f"hf:{tmp_path / 'set'}")


def test_dataset_whose_rows_are_lines(tmp_path: Path) -> None:
    """WikiText's form: one line a row, headings in rows of their own."""
    datasets = pytest.importorskip("datasets")
    rows = [{"text": line + "\n" if line else ""} for line in ARTICLES.split("\n")]
    loaded = {name: datasets.Dataset.from_list(rows) for name in ("train", "validation", "test")}
    datasets.DatasetDict(loaded).save_to_disk(str(tmp_path / "set"))
    corpus = load_corpus(f"hf:{tmp_path / 'set'}")
    assert names(corpus.test) == ["Title 0", "Title 1", "Title 2", "Title 3"]
    assert " text of 2 \n" in corpus.test[2].text


def test_dataset_by_name_from_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for split in ("train", "validation", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", json.dumps({"text": f"{split} text"}))
    corpus = load_corpus(f"hf:{tmp_path / 'data'}")
    assert [d.text for d in everything(corpus)] == ["train text", "validation text", "test text"]
    assert names(corpus.train) == ["train/0"]


def test_dataset_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="cannot be loaded"):
        load_corpus(f"hf:{tmp_path / 'none'}")


# Tokens


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    pytest.importorskip("transformers")
    from knnext.lm.train import train_tokenizer

    text = "the quick brown fox jumps over the lazy dog. def f(x): return x + 1\n" * 20
    return train_tokenizer([Document("a", text)], vocab_size=300)


TEXTS = [
    Document("plain", "the quick brown fox\njumps  over"),
    Document("accents", "naïve café – déjà vu"),
    Document("special", "before <|endoftext|> after"),
    Document("empty", ""),
]


def test_tokens_lie_where_the_offsets_say(tokenizer: Any) -> None:
    result = tokenize(TEXTS, tokenizer)
    separator = separator_token(tokenizer)
    assert result.tokens.dtype == np.int32 and result.document_offsets.dtype == np.int64
    assert result.names == [d.name for d in TEXTS]
    assert result.document_offsets[-1] == len(result) == len(result.tokens)
    for i, document in enumerate(TEXTS):
        begin, end = result.document_offsets[i : i + 2]
        assert result.tokens[begin] == separator
        assert tokenizer.decode(result.tokens[begin + 1 : end]) == document.text
        assert (result.document_of(np.arange(begin, end)) == i).all()
    # only ours: the mark spelled out in a text is text
    assert (result.tokens == separator).sum() == len(TEXTS)
    assert result.num_words.tolist() == [6, 5, 3, 0]
    assert result.num_bytes.tolist() == [len(d.text.encode()) for d in TEXTS]


def test_heads_of_documents_count_their_own_words(tokenizer: Any) -> None:
    result = tokenize(TEXTS, tokenizer, max_tokens=4)
    assert np.diff(result.document_offsets).tolist() == [5, 5, 5, 1]
    head = tokenizer.decode(result.tokens[1:5])
    assert TEXTS[0].text.startswith(head)
    assert result.num_bytes[0] == len(head.encode())
    assert result.num_words[0] == len(head.split())


def test_tokenize_in_batches_is_the_same(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenize(TEXTS, tokenizer)
    monkeypatch.setattr("knnext.corpus.tokenized._BATCH_CHARS", 1)
    pieces = tokenize(TEXTS, tokenizer)
    assert np.array_equal(whole.tokens, pieces.tokens)
    assert np.array_equal(whole.num_words, pieces.num_words)


def test_nothing_to_tokenize(tokenizer: Any) -> None:
    result: TokenizedDocuments = tokenize([], tokenizer)
    assert len(result) == 0 and result.document_offsets.tolist() == [0]


def test_bad_tokenizers(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="fast"):
        tokenize(TEXTS, object())
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        tokenize(TEXTS, tokenizer, max_tokens=0)
    with pytest.raises(ValueError, match="neither bos_token nor eos_token"):
        separator_token(object())
