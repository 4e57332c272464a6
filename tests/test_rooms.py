"""The house's order: data flows one way through the rooms, and no import runs against it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "knnext"

#: From the first room to the last. What stands in one line are single files, which know no room
#: but those before them. A room knows itself and the rooms before it.
ORDER = (
    ("errors",),
    ("launch",),
    ("_host", "devices", "progress", "say", "output", "reference", "ranks"),
    ("ops",),
    ("testing",),
    ("corpus",),
    ("lm",),
    ("datastore",),
    ("index",),
    ("planning",),
    ("evaluation",),
    ("hub", "distill"),
    ("report",),
    ("serve",),
    ("explore",),
    ("demo",),
    ("experiments.lab",),
    ("experiments",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def module_name(path: Path) -> str:
    """``"lm.load"`` for knnext/lm/load.py, ``"lm"`` for its ``__init__``, "" for the package's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    first, _, rest = module.partition(".")
    lab = first == "experiments" and (rest == "lab" or rest.startswith("lab."))
    return "experiments.lab" if lab else first


def imported(module: str) -> Iterator[str]:
    """Our own modules that the file imports, wherever in it, also for types alone."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here"
            source = node.module or ""
            inner = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("knnext.") in MODULES else source for name in inner]
        else:
            continue
        for name in names:
            if name.startswith("knnext."):
                found = name.removeprefix("knnext.")
                yield found if found in MODULES or found == "_host" else found.rpartition(".")[0]


IMPORTS = {module: sorted(set(imported(module)) - {module}) for module in MODULES}


def test_every_module_has_a_room() -> None:
    assert {room(module) for module in MODULES} - {""} <= set(RANK)
    assert IMPORTS["cli.build"] and IMPORTS["experiments.padding"]  # the reader of imports reads


@pytest.mark.parametrize("module", sorted(set(MODULES) - {""}))
def test_no_import_runs_against_the_order(module: str) -> None:
    back = [name for name in IMPORTS[module] if RANK[room(name)] > RANK[room(module)]]
    assert not back, f"knnext.{module} imports from a room after its own: {', '.join(back)}"
    beside = [
        name
        for name in IMPORTS[module]
        if RANK[room(name)] == RANK[room(module)] and room(name) != room(module)
    ]
    # ops falls back to the reference, and is loaded beside the small files that all may use.
    assert not beside, f"knnext.{module} imports a file beside it: {', '.join(beside)}"


def test_there_is_no_circle() -> None:
    left = {module: set(found) & set(MODULES) for module, found in IMPORTS.items()}
    while free := [module for module, found in left.items() if not found & set(left)]:
        for module in free:
            del left[module]
    assert not left, f"circles of imports run through {', '.join(sorted(left))}"


def test_the_table_in_contributing_is_true() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `([\w.]+)` \| [^|]+ \|(.*)\|$", text, flags=re.MULTILINE)
    stated = {name: set(re.findall(r"`([\w.]+)`", known)) for name, known in lines}
    # Which all may know.
    files = {"", "_host", "devices", "errors", "progress", "say", "output", "launch", "ranks"}
    found: dict[str, set[str]] = {name: set() for name in stated}
    for module, names in IMPORTS.items():
        if room(module) in found:
            found[room(module)] |= {room(name) for name in names} - files - {room(module)}
    del stated["cli"], found["cli"]  # the last room may know all
    assert stated == found


def test_a_planted_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from knnext.cli import parser\nimport knnext.report.table\n")
    monkeypatch.setitem(MODULES, "corpus.planted", planted)
    assert set(imported("corpus.planted")) == {"cli.parser", "report.table"}
