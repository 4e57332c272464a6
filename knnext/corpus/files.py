"""Corpora from text files and folders: which file is which split, and where documents begin.

Splits, by name: a file or folder called exactly ``train``, ``valid`` (or ``validation``, ``val``,
``dev``) or ``test`` but for its suffix is that split: ``train.txt.xz``, ``test/``, and pieces of
one, ``train-00000-of-00004.jsonl``. So are files that differ in that word alone and are half of
the folder or more, as WikiText's ``wiki.train.tokens`` and ``wiki.valid.tokens``. A folder with
none of these has no split: all its files are one text, divided by a hash of the documents' names
(knnext/corpus/documents.py), as a split is that is missing beside ``train``. What lies beside
splits is not read, and is named.

Every file that is text is read, whatever its suffix. Hidden, binary and unreadable ones are passed
over, counted and named; a byte that is not UTF-8 in a file that is text by its suffix is an error.

Documents, in this order of rules, each for one file:

1. ``.jsonl``: one object a line, its ``text`` (the given column); named by ``name``, ``title``,
   ``id`` or line number. ``.json``: a list of such objects or of strings, one object, or lists of
   them in an object. ``.ipynb``: the sources of the cells.
2. Two or more level-one headings in WikiText's form, ``= Title =`` alone on a line at the file's
   head or after an empty line: a document from each heading to the next, named by its title.
3. Lines that hold only ``<|endoftext|>``, or form feeds: a document between each two.
4. A file that is a whole split or the whole corpus, and longer than 64 KiB: cut at empty lines
   into documents of 16 KiB or little more (else nothing could be divided or resampled).
5. Any other file is one document, named by its path in the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from knnext.corpus.decode import Reading, UnreadableError, kind_of, plain_name, read_text
from knnext.corpus.documents import Document, few, unique_names
from knnext.corpus.rows import NoTextError, json_file, json_lines, notebook
from knnext.corpus.walk import Skipped, files_below
from knnext.errors import CorpusError

# fmt: off
#: What is text by its name: not being UTF-8 is then an error and no reason to pass it over.
_TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".tokens", ".raw", ".log", ".jsonl", ".json", ".ipynb", ".csv", ".tsv",
    ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".html", ".xml",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java",
    ".js", ".ts", ".go", ".rs", ".rb", ".pl", ".sh",
})
# fmt: on
_ROWS = {".jsonl": json_lines, ".ndjson": json_lines, ".json": json_file, ".ipynb": notebook}
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
_PIECE = re.compile(r"(?P<word>.+)-\d+-of-\d+")
_HEADING = re.compile(r"^ ?= (?P<title>[^=\s](?:.*[^=\s])?) = ?$")
_MARK = re.compile(r"^<\|endoftext\|>\s*$|\f", re.MULTILINE)
_CUT_ABOVE, _CUT_SIZE = 64 * 1024, 16 * 1024


def file_documents(path: Path, reading: Reading) -> list[Document]:
    """The documents of one file that is the whole corpus."""
    if kind_of(path) == "binary":
        raise CorpusError(f"corpus file {path} is binary, not UTF-8 text")
    return unique_names(_documents(path, plain_name(path.name), reading, whole=True))


def folder_splits(folder: Path, reading: Reading) -> dict[str, list[Document]]:
    """Splits found in the folder by name; ``{"all": documents}`` where none is named."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    found = _named_splits([entry for entry in entries if entry.is_dir() or _is_text(entry)])
    if not found:
        return {"all": _folder_documents(folder, folder, reading)}
    read = [path for paths in found.values() for path in paths]
    names = ", ".join(_shown(path) for path in read)
    if "train" not in found:
        raise CorpusError(
            f"corpus folder {folder} has {names}, which by that name is a split, but nothing named "
            "'train' beside it: name the rest train (a file or a folder), or rename "
            f"{_shown(read[0])} where the folder is one text without splits"
        )
    others = [_shown(entry) for entry in entries if entry not in read]
    if others:
        reading.notes.append(
            f"corpus folder {folder}: its splits are {names}; {len(others):,} others beside them "
            f"are not read: {few(others)}"
        )
    return {
        split: unique_names([d for p in paths for d in _entry_documents(p, folder, reading)])
        for split, paths in found.items()
    }


def _shown(entry: Path) -> str:
    return entry.name + "/" * entry.is_dir()


def _named_splits(entries: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for entry in entries:
        stem = entry.name if entry.is_dir() else Path(plain_name(entry.name)).stem
        piece = _PIECE.fullmatch(stem.lower())
        split = _SPLIT_WORDS.get(piece["word"] if piece else stem.lower())
        if split is not None:
            found.setdefault(split, []).append(entry)
    return found or _prefixed_splits(entries)


def _prefixed_splits(entries: list[Path]) -> dict[str, list[Path]]:
    """``wiki.train.tokens`` beside ``wiki.valid.tokens``: the word alone makes the difference."""
    groups: dict[str, dict[str, list[Path]]] = {}
    for entry in entries:
        prefix, dot, word = Path(plain_name(entry.name)).stem.rpartition(".")
        if dot and not entry.is_dir() and word.lower() in _SPLIT_WORDS:
            groups.setdefault(prefix, {}).setdefault(_SPLIT_WORDS[word.lower()], []).append(entry)
    sets = [group for group in groups.values() if "train" in group and len(group) > 1]
    # Two files of many may be called so by chance, and would leave all the others unread.
    if len(sets) != 1 or 2 * sum(map(len, sets[0].values())) < len(entries):
        return {}
    return sets[0]


def _entry_documents(entry: Path, root: Path, reading: Reading) -> list[Document]:
    if entry.is_dir():
        return _folder_documents(entry, root, reading)
    return _documents(entry, plain_name(entry.name), reading, whole=True)


def _folder_documents(folder: Path, root: Path, reading: Reading) -> list[Document]:
    documents: list[Document] = []
    skipped = Skipped()
    for name, path in files_below(folder, root, skipped):
        documents += _file_in_folder(path, name, reading, skipped)
    reading.notes += skipped.note(f"corpus folder {folder}")
    return unique_names(documents)


def _file_in_folder(path: Path, name: str, reading: Reading, skipped: Skipped) -> list[Document]:
    """Its documents, or none and the reason in `skipped`."""
    by_name = _text_by_name(path)
    try:
        kind = kind_of(path)
        if kind == "text" or (by_name and kind != "binary"):
            return _documents(path, name, reading, whole=False)
        skipped.add(kind, name)
    except NoTextError:
        skipped.add(f"JSON without a {reading.text_column!r}", name)
    except UnreadableError as error:
        skipped.add("unreadable", f"{name}: {error}")
    except CorpusError:
        if by_name:
            raise
        skipped.add("not UTF-8 or damaged", name)
    return []


def _text_by_name(path: Path) -> bool:
    return Path(plain_name(path.name)).suffix.lower() in _TEXT_SUFFIXES


def _is_text(path: Path) -> bool:
    try:
        kind = kind_of(path) if path.is_file() else "none"
    except CorpusError:  # told where it is read
        return _text_by_name(path)
    return kind == "text" or (kind != "binary" and _text_by_name(path))


def _documents(path: Path, name: str, reading: Reading, whole: bool) -> list[Document]:
    """``name``: of the documents. The suffix below the packing decides how the text is read."""
    text = read_text(path, reading.errors)
    rows = _ROWS.get(Path(plain_name(path.name)).suffix.lower())
    if rows is not None:
        return rows(str(path), name, text, reading)
    return documents_of_text(name, text, whole=whole)


def documents_of_text(name: str, text: str, whole: bool) -> list[Document]:
    """Rules 2 to 5 of this module for one text; ``whole``: it is a split or a corpus by itself."""
    pieces = list(_by_headings(text)) or list(_by_marks(name, text))
    if not pieces and whole and len(text) > _CUT_ABOVE:
        pieces = list(_by_size(name, text))
    documents = [Document(n, t) for n, t in pieces or [(name, text)]]
    return [d for d in documents if d.text.strip()]


def _by_headings(text: str) -> Iterator[tuple[str, str]]:
    lines = text.splitlines(keepends=True)
    starts = []
    for i, line in enumerate(lines):
        match = _HEADING.match(line.rstrip("\n"))
        if match and (i == 0 or not lines[i - 1].strip()):
            starts.append((i, match["title"]))
    if len(starts) < 2:
        return
    if "".join(lines[: starts[0][0]]).strip():
        yield "preface", "".join(lines[: starts[0][0]])
    ends = [i for i, _ in starts[1:]] + [len(lines)]
    for (start, title), end in zip(starts, ends, strict=True):
        yield title, "".join(lines[start:end])


def _by_marks(name: str, text: str) -> Iterator[tuple[str, str]]:
    pieces = [piece.lstrip("\n") for piece in _MARK.split(text)]
    if len(pieces) > 1:
        yield from _numbered(name, pieces)


def _by_size(name: str, text: str) -> Iterator[tuple[str, str]]:
    pieces, start = [], 0
    while start < len(text):
        cut = text.find("\n\n", start + _CUT_SIZE)
        if cut < 0:  # no paragraph ends: a line will do
            cut = text.find("\n", start + _CUT_SIZE) - 1
        end = len(text) if cut < 0 else cut + 2
        pieces.append(text[start:end])
        start = end
    yield from _numbered(name, pieces)


def _numbered(name: str, pieces: list[str]) -> Iterator[tuple[str, str]]:
    kept = [piece for piece in pieces if piece.strip()]
    width = len(str(len(kept)))
    for i, piece in enumerate(kept, start=1):
        yield f"{name}#{i:0{width}d}", piece
