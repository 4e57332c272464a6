"""Text of files, servers and models on a terminal: shown, and never obeyed."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import pytest

from knnext.cli import _note, main
from knnext.cli.generate import _comparison, _neighbor_lines
from knnext.datastore import Datastore
from knnext.errors import KnnextWarning
from knnext.evaluation.influence import Influence
from knnext.evaluation.spans import Span
from knnext.say import harmless, log_on_stderr
from tests.datastore import small

#: A title, a color, an erased line, a reversed order, a backspace, C1's own escape; a forged line.
EVIL = "a\x1b]0;owned\x07\x1b[31mb\r\x1b[2K\u202ec\b\x9b1m\x7f\nstate       fine"


def obeyed(text: str) -> set[str]:
    """The signs in it that a terminal does not show."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t"}


def test_what_is_harmless() -> None:
    assert not obeyed(harmless(EVIL)) and harmless(EVIL).count("\n") == 1
    assert [harmless(c) for c in ("\r", "\x1b", "\x9b", "\u202e", "\u2066", "\0")] == ["·"] * 6
    plain = "tab\tline\r\nemoji 👩\u200d👩 नमस्\u200dते \u200fעברית −5 \udc80"
    assert harmless(plain) == plain


def test_info_of_a_store_of_somebody_elses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"split": EVIL, "seed": 1, "shares": [1.0, 0.0, 0.0], "max_bytes": None}
    names = ("model_id", "model_revision", "tokenizer_hash", "corpus", "key_layer")
    with small.begin(
        tmp_path / "S", **dict.fromkeys(names, EVIL), text=text, origin={EVIL: EVIL},
        model={"dtype": EVIL, "adapter": EVIL},
    ) as store:  # fmt: skip
        store.append(*small.rows(0, 20))
    small.write(tmp_path / "plain", 20)
    lines = {}
    for name in ("plain", "S"):
        assert main(["info", str(tmp_path / name)]) == 0
        said = capsys.readouterr()
        assert not obeyed(said.out + said.err)
        lines[name] = said.out.count("\n")
    assert lines["S"] == lines["plain"] and "owned" in said.out
    assert not obeyed(Datastore.open(tmp_path / "S").describe())


def test_errors_notes_and_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write(tmp_path / "S", 20)
    (tmp_path / "S" / "meta.json").write_text('{"magic": "\\u001b[31m"}')
    for more in ((), ("--debug",)):
        assert main(["info", str(tmp_path / EVIL.replace("/", "")), *more]) == 1
        assert main(["info", str(tmp_path / "S"), *more]) == 1
    said = capsys.readouterr()
    assert not obeyed(said.out + said.err) and "owned" in said.err
    _note(KnnextWarning(EVIL), KnnextWarning, "", 0)
    with log_on_stderr("info"):
        logging.getLogger("knnext.test").warning("%s", EVIL)
    said = capsys.readouterr()
    assert not obeyed(said.err) and said.err.count("owned") == 2


def test_names_of_documents_take_one_line() -> None:
    span = Span(0, EVIL, EVIL, EVIL, EVIL)
    one = Influence(0.5, 0.5, 0.5, [(EVIL, 0.5)], 3, 0)
    lines = _neighbor_lines(1, {"distance": 1.0, "share": 0.5, "document": EVIL}, span)
    for line in [*lines, *_comparison(EVIL, EVIL + "x", [EVIL], [one])]:
        assert not obeyed(line) and "\n" not in line
