"""Corpora from text files and folders: which file is which split, and where documents begin.

Splits, by name: a file or folder whose name, cut at anything but letters, has the part ``train``,
``valid`` (or ``validation``, ``val``, ``dev``) or ``test`` is that split: ``train.txt.xz``,
``wiki.valid.tokens``, ``test/``. Where no such name is found, or a split is missing, documents are
divided by a hash of their names (knnext/corpus/documents.py).

Documents, in this order of rules, each for one file:

1. ``.jsonl``: one object a line, its ``text`` (the given column); named by ``name``, ``title``,
   ``id`` or line number.
2. Two or more level-one headings in WikiText's form, ``= Title =`` alone on a line at the file's
   head or after an empty line: a document from each heading to the next, named by its title.
3. Lines that hold only ``<|endoftext|>``, or form feeds: a document between each two.
4. A file that is a whole split or the whole corpus, and longer than 64 KiB: cut at empty lines
   into documents of 16 KiB or little more (else nothing could be divided or resampled).
5. Any other file is one document, named by its path in the folder.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from knnext.corpus.documents import CorpusError, Document, unique_names

# fmt: off
_TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".tokens", ".raw", ".jsonl", ".csv", ".tsv",
    ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".html", ".xml",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java",
    ".js", ".ts", ".go", ".rs", ".rb", ".pl", ".sh",
})
# fmt: on
_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.decompress,
    ".gz": gzip.decompress,
}
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
_HEADING = re.compile(r"^ ?= (?P<title>[^=\s](?:.*[^=\s])?) = ?$")
_MARK = re.compile(r"^<\|endoftext\|>\s*$|\f", re.MULTILINE)
_CUT_ABOVE, _CUT_SIZE = 64 * 1024, 16 * 1024


def file_documents(path: Path, text_column: str = "text") -> list[Document]:
    """The documents of one file that is the whole corpus."""
    return unique_names(_documents(path, _plain_name(path.name), text_column, whole=True))


def folder_splits(folder: Path, text_column: str = "text") -> dict[str, list[Document]]:
    """Splits found in the folder by name; ``{"all": documents}`` where none is named.

    Hidden files and folders and files that are no text are passed over.
    """
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        split = _split_of(entry)
        if split is not None:
            found.setdefault(split, []).append(entry)
    if "train" not in found:
        if found:
            names = ", ".join(p.name for paths in found.values() for p in paths)
            raise CorpusError(f"corpus folder {folder} has {names} but nothing named 'train'")
        return {"all": _folder_documents(folder, folder, text_column)}
    return {
        split: [d for p in paths for d in _entry_documents(p, folder, text_column)]
        for split, paths in found.items()
    }


def _split_of(entry: Path) -> str | None:
    if entry.name.startswith(".") or not (entry.is_dir() or _is_text(entry)):
        return None
    parts = re.split(r"[^a-z]+", entry.name.lower())
    splits = {_SPLIT_WORDS[part] for part in parts if part in _SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def _entry_documents(entry: Path, root: Path, text_column: str) -> list[Document]:
    if entry.is_dir():
        return _folder_documents(entry, root, text_column)
    return unique_names(_documents(entry, _plain_name(entry.name), text_column, whole=True))


def _folder_documents(folder: Path, root: Path, text_column: str) -> list[Document]:
    documents: list[Document] = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(root)
        if _is_text(path) and not any(part.startswith(".") for part in relative.parts):
            documents += _documents(path, relative.as_posix(), text_column, whole=False)
    return unique_names(documents)


def _is_text(path: Path) -> bool:
    return path.is_file() and Path(_plain_name(path.name)).suffix.lower() in _TEXT_SUFFIXES


def _plain_name(name: str) -> str:
    """The name without the suffix of its packing."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix in _UNPACK else name


def _read(path: Path) -> str:
    unpack = _UNPACK.get(path.suffix, bytes)
    try:
        text = unpack(path.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"corpus file {path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise CorpusError(f"corpus file {path} cannot be read: {error}") from error
    return text.replace("\r\n", "\n")


def _documents(path: Path, name: str, text_column: str, whole: bool) -> list[Document]:
    text = _read(path)
    if Path(name).suffix.lower() == ".jsonl":
        return list(_json_lines(path, name, text, text_column))
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


def _json_lines(path: Path, name: str, text: str, column: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise CorpusError(f"{path}, line {number} has no text under {column!r}")
        label = next((row[key] for key in ("name", "title", "id") if row.get(key)), None)
        if row[column].strip():
            yield Document(str(label) if label is not None else f"{name}#{number}", row[column])
