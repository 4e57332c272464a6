"""Bytes to text: unpacked, decoded, and with the place of what is no text."""

from __future__ import annotations

import codecs
import gzip
import lzma
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knnext.errors import CorpusError

ERRORS = ("strict", "replace")
#: How to go on after such an error, for the messages.
READ_ON = "--text-errors replace (errors='replace') reads on"

_OPEN: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
_SURROGATE = re.compile("[\ud800-\udfff]")
_HEAD_BYTES = 8192


class UnreadableError(CorpusError):
    """A file that this user may not read; in a folder of others it is passed over."""


@dataclass
class Reading:
    """How a corpus is read, and what there is to say about it afterwards.

    `errors`: what is no text ends the reading (`"strict"`), or its bytes become U+FFFD and rows
    without text are left out (`"replace"`).
    """

    text_column: str = "text"
    errors: str = "strict"
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.errors not in ERRORS:
            raise ValueError(f"errors must be one of {ERRORS}, got {self.errors!r}")


def decode(data: bytes, where: str, errors: str = "strict") -> str:
    """UTF-8 as text, without a byte order mark and with ``\\n`` as line end.

    CorpusError names ``where`` and the line of the first byte that is not UTF-8.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise CorpusError(
            f"{where}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8"
            f"{' (the file begins as UTF-16 does: convert it)' if wide else ''}; {READ_ON}"
        ) from error
    return text.replace("\r\n", "\n")


def check_text(text: str, where: str, errors: str = "strict") -> str:
    """The text, where no half of a surrogate pair stands alone in it: no tokenizer reads that.

    JSON's escapes and command lines can hold one. CorpusError names ``where`` and the place.
    """
    found = _SURROGATE.search(text)
    if found is None:
        return text
    if errors == "replace":
        return _SURROGATE.sub("\ufffd", text)
    raise CorpusError(
        f"{where}, character {found.start() + 1}: lone surrogate U+{ord(found[0]):04X} is no text; "
        f"{READ_ON}"
    )


def plain_name(name: str) -> str:
    """The name without the suffix of its packing."""
    suffix = Path(name).suffix
    return name[: -len(suffix)] if suffix in _OPEN else name


def read_bytes(path: Path, limit: int = -1) -> bytes:
    """The unpacked content, or its head. CorpusError for what cannot be read."""
    opened = _OPEN.get(path.suffix, Path.open)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CorpusError(f"corpus file {path} cannot be read: it is no regular file")
    try:
        with opened(path, "rb") as file:
            data: bytes = file.read(limit)
            return data
    except PermissionError as error:
        raise UnreadableError(f"corpus file {path} cannot be read: {error.strerror}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CorpusError(f"corpus file {path} cannot be read: {error}") from error


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file, unpacked."""
    return decode(read_bytes(path), f"corpus file {path}", errors)


def kind_of(path: Path) -> str:
    """``"text"``, ``"binary"`` or ``"not UTF-8"``, by the first 8 KiB of the content."""
    head = read_bytes(path, _HEAD_BYTES)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "not UTF-8"
    if b"\0" in head or head.startswith(b"%PDF-"):
        return "binary"
    try:
        # A longer file's head may end within a character.
        codecs.getincrementaldecoder("utf-8")().decode(head, len(head) < _HEAD_BYTES)
    except UnicodeDecodeError:
        return "not UTF-8"
    return "text"
