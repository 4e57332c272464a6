"""The embedded corpus: the running interpreter's own standard library, sources and help topics.

Every Python has it, so the demo needs no download. What would flatter a kNN-LM is left out: tests,
vendored copies, generated tables, files that are mostly a copy of another, and help topics that
repeat a longer one. A neighbour found is then a habit of the code, not the same line again.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from knnext.corpus.documents import Document
from knnext.errors import CorpusError

#: Folders that are no part of the library's own text, wherever they stand in the path.
_TESTS = {"test", "tests", "idle_test", "testing", "__phello__"}
_VENDORED = {"site-packages", "dist-packages", "_vendor", "_vendored", "_bundled", "pgen2"}
_TABLES = {"encodings", "__pycache__", "lib-dynload"}
_SKIPPED_FOLDERS = frozenset(_TESTS | _VENDORED | _TABLES)
_TABLE_ROW = re.compile(
    r"""^\s*[-'"\d(\[{bu].*[,:}\])]\s*(\#.*)?$"""  # a literal that goes on: 'a': 1,  (1, 2),  0x1f,
    r"""|^\s*\w+\s*[:=]\s*-?[\d'"]+,?\s*(\#.*)?$"""  # NAME = 17
)
#: A file is a table where more than this share of its lines are rows.
_TABLE_SHARE, _TABLE_LINES = 0.5, 60
#: A file is a copy where more than this share of its longer lines stand in longer files.
_COPY_SHARE, _COPY_LINE_LENGTH, _COPY_LINES = 0.5, 25, 5
_TOPIC_MIN_CHARS = 200
_MIN_BYTES, _MIN_DOCUMENTS = 1_000_000, 60


def stdlib_documents(root: Path | None = None) -> list[Document]:
    """Sources (named by their path below the library's folder) and topics (``topics/NAME``).

    ``root`` defaults to the folder of the running interpreter's library, also inside a venv.
    Sorted by name. Raises CorpusError where less than 1 MB or 60 documents are found, as with a
    zipped, frozen or byte-compiled library.
    """
    folder = root if root is not None else Path(sysconfig.get_path("stdlib"))
    documents = _without_copies(_sources(folder))
    documents += _topics() if root is None else []
    size = sum(d.num_bytes for d in documents)
    if size < _MIN_BYTES or len(documents) < _MIN_DOCUMENTS:
        version = ".".join(map(str, sys.version_info[:3]))
        raise CorpusError(
            f"corpus 'stdlib': Python {version} has only {len(documents)} usable source files "
            f"({size:,} bytes) under {folder}; at least {_MIN_DOCUMENTS} and {_MIN_BYTES:,} bytes "
            "are wanted. A zipped, stripped or minimal Python lacks its sources: use another "
            "Python, or give a text file or a folder as the corpus"
        )
    return sorted(documents, key=lambda d: d.name)


def _sources(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if _is_skipped(relative):
            continue
        try:
            with tokenize.open(path) as file:  # knows the coding cookie
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        if text.strip() and not _is_table(text):
            yield Document(relative.as_posix(), text)


def _is_skipped(relative: Path) -> bool:
    top = relative.parts[0]
    return (
        not _SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1])
        or top.startswith(("config-", "_sysconfigdata"))  # written by the build of this Python
        or relative.parts == ("pydoc_data", "topics.py")  # read as topics instead
    )


def _is_table(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    rows = sum(_TABLE_ROW.match(line) is not None for line in lines)
    return len(lines) >= _TABLE_LINES and rows > _TABLE_SHARE * len(lines)


def _without_copies(documents: Iterator[Document]) -> list[Document]:
    """Drops a file that repeats longer ones (the C and Python twins, old compilers, templates)."""
    seen: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda d: (-len(d.text), d.name)):
        stripped = (line.strip() for line in document.text.splitlines())
        lines = [line for line in stripped if len(line) > _COPY_LINE_LENGTH]
        copied = sum(line in seen for line in lines)
        if len(lines) < _COPY_LINES or copied <= _COPY_SHARE * len(lines):
            kept.append(document)
            seen.update(lines)
    return kept


def _topics() -> list[Document]:
    """pydoc's help topics, each without the paragraphs that a longer topic has already.

    The topic ``compound``, for one, holds ``if``, ``for``, ``try``, ``with`` and ``class`` whole.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions pack it apart
        return []
    seen: set[str] = set()
    documents = []
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()]
        fresh = [p for p in paragraphs if p.strip() not in seen]
        seen.update(p.strip() for p in paragraphs)
        body = "\n\n".join(fresh)
        if len(body) >= _TOPIC_MIN_CHARS:
            documents.append(Document(f"topics/{name}", body + "\n"))
    return documents
