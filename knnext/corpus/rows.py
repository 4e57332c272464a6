"""Documents out of JSON: lines, lists and objects with a text, and the cells of notebooks."""

from __future__ import annotations

import json
from typing import Any

from knnext.corpus.decode import READ_ON, Reading, check_text
from knnext.corpus.documents import Document, few
from knnext.errors import CorpusError

_LABELS = ("name", "title", "id")


class NoTextError(CorpusError):
    """Not one row of a JSON file has a text: it may be no part of a corpus at all."""


def json_lines(where: str, name: str, text: str, reading: Reading) -> list[Document]:
    """One object (or string) a line; ``where`` is the file for messages, ``name`` for documents."""
    rows: list[tuple[str, Any]] = []
    bad: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"line {number}", json.loads(line)))
        except (json.JSONDecodeError, RecursionError) as error:
            if reading.errors == "strict":
                raise CorpusError(
                    f"{where}, line {number} is not JSON: {error}; {READ_ON}"
                ) from error
            bad.append(f"line {number}")
    return _documents(where, name, rows, bad, reading)


def json_file(where: str, name: str, text: str, reading: Reading) -> list[Document]:
    """A list of strings or objects, one object, an object of such lists; else JSON lines."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if _is_json(text.lstrip().partition("\n")[0]):
            return json_lines(where, name, text, reading)
        raise CorpusError(f"{where} is not JSON: {error}") from error
    rows = [(f"row {i}", row) for i, row in enumerate(_rows(value, reading.text_column), 1)]
    if not rows and isinstance(value, dict):
        raise NoTextError(_no_text(where, [("", value)], reading.text_column))
    if isinstance(value, dict) and len(rows) == 1 and rows[0][1] is value:
        rows = [("", value)]
    return _documents(where, name, rows, [], reading)


def notebook(where: str, name: str, text: str, reading: Reading) -> list[Document]:
    """The sources of a notebook's cells, without what they printed, as one document."""
    try:
        value = json.loads(text)
        sheets = value.get("worksheets") or [value]  # format 3 had sheets, and input for source
        cells = [cell for sheet in sheets for cell in sheet["cells"]]
        sources = [cell.get("source", cell.get("input", "")) for cell in cells]
        parts = [source if isinstance(source, str) else "".join(source) for source in sources]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorpusError(f"{where} is no notebook: {type(error).__name__}: {error}") from error
    joined = "\n\n".join(part.strip("\n") for part in parts if part.strip())
    joined = check_text(joined, where, reading.errors)
    return [Document(name, joined + "\n")] if joined else []


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _rows(value: Any, column: str) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    texts = value.get(column)
    if isinstance(texts, list):  # a table by columns
        others = [k for k in _LABELS if _same_length(value.get(k), texts)]
        return [{column: text, **{k: value[k][i] for k in others}} for i, text in enumerate(texts)]
    if isinstance(texts, str):
        return [value]
    lists = [rows for rows in value.values() if isinstance(rows, list)]
    return [row for rows in lists for row in rows if isinstance(row, dict) and column in row]


def _same_length(labels: Any, texts: list[Any]) -> bool:
    return isinstance(labels, list) and len(labels) == len(texts)


def _documents(
    where: str, name: str, rows: list[tuple[str, Any]], bad: list[str], reading: Reading
) -> list[Document]:
    column = reading.text_column
    texts = [(place, row, _text(row, column)) for place, row in rows]
    if not any(isinstance(text, str) for _, _, text in texts):
        if not rows and not bad:
            return []
        raise NoTextError(_no_text(where, rows, column))
    found = []
    for number, (place, row, text) in enumerate(texts, start=1):
        at = f"{where}, {place}" if place else where
        if text is None and reading.errors == "strict":
            raise CorpusError(f"{at} has no text under {column!r}; {READ_ON}")
        if text is None:
            bad.append(place)
        elif text.strip():
            text = check_text(text, at, reading.errors)
            found.append(Document(_label(row, name, place, number), text))
    if bad:
        reading.notes.append(f"{where}: {len(bad):,} rows have no text, left out: {few(bad)}")
    return found


def _text(row: Any, column: str) -> str | None:
    text = row.get(column) if isinstance(row, dict) else row
    return text if isinstance(text, str) else None


def _label(row: Any, name: str, place: str, number: int) -> str:
    keys = _LABELS if isinstance(row, dict) else ()
    label = next((row[key] for key in keys if row.get(key) not in (None, "")), None)
    if label is not None:
        return str(label)
    return f"{name}#{place.rpartition(' ')[2] or number}" if place else name


def _no_text(where: str, rows: list[tuple[str, Any]], column: str) -> str:
    place, row = rows[0] if rows else ("", None)
    at = f"{where}, {place}" if place else where
    has = f"; it has {few(list(map(str, row)))}" if isinstance(row, dict) and row else ""
    return f"{at} has no text under {column!r}{has}"
