"""The documentation site holds all that is public, and every page is reached from its first."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from knnext.cli.parser import build_parser

DOCS = Path(__file__).resolve().parents[1] / "docs"


def conf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONF = conf()


@pytest.mark.parametrize("module", CONF.PUBLIC)
def test_every_public_name_says_what_it_is(module: str) -> None:
    names = CONF.public_names(module)
    assert names, f"{module} promises nothing"
    for name in names:
        value = getattr(importlib.import_module(module), name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert (value.__doc__ or "").strip(), f"{module}.{name} has no docstring"


def test_rooms_that_promise_names_have_a_page() -> None:
    package = DOCS.parent / "knnext"
    rooms = [path.parent for path in sorted(package.glob("*/__init__.py"))]
    promising = {
        f"knnext.{room.name}"
        for room in rooms
        if re.search(r"^__all__", (room / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    }
    # The page of `knnext explore` is a command; nothing of it is promised to other programs.
    assert promising - {"knnext.ops", "knnext.explore"} <= set(CONF.PUBLIC)


def test_the_ops_stand_on_the_first_page() -> None:
    import knnext.ops

    page = CONF.module_page("knnext", set())
    for name in knnext.__all__:
        assert f":: knnext.{name}\n" in page, name
    ops = {n for n in dir(knnext.ops) if inspect.isfunction(getattr(knnext.ops, n))}
    assert {name for name in ops if not name.startswith("_")} <= {*knnext.__all__, "is_available"}


def test_what_one_page_has_another_does_not_repeat() -> None:
    seen: set[int] = set()
    pages = [CONF.module_page(module, seen) for module in CONF.PUBLIC]
    entries = re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)(\w+)$", "\n".join(pages), re.MULTILINE)
    entries = [e for e in entries if e not in {m.rpartition(".")[2] for m in CONF.PUBLIC}]
    assert len(entries) == len(set(entries)) > 50


def test_every_command_is_there() -> None:
    page = CONF.command_page()
    found = build_parser()._actions
    commands = next(a for a in found if isinstance(a, argparse._SubParsersAction))
    for name in commands.choices:
        assert f"\n{name}\n{'-' * len(name)}\n" in page and f"usage: knnext {name}" in page


@pytest.mark.parametrize(("name", "path"), CONF.ELSEWHERE.items())
def test_pages_of_other_folders_keep_their_links(name: str, path: str) -> None:
    page = CONF.page_from_elsewhere(DOCS.parent / path)
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert re.search(rf"\bgenerated/{name}>?$", index, re.MULTILINE)
    for link in re.findall(r"\]\((?!\w+:|#)([^)\s]+)\)", page):
        made = link.removesuffix(".md") in CONF.ELSEWHERE
        assert made or (CONF.GENERATED / link).resolve().exists(), link


def heading_anchors(text: str) -> set[str]:
    """As GitHub makes them, and the site."""
    lines = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    words = (line.lstrip("#").strip().lower() for line in lines if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", word).replace(" ", "-") for word in words}


def test_every_link_leads_somewhere() -> None:
    """On GitHub, too, where Sphinx has not looked: to a file, and to a heading in it."""
    root, tutorials = DOCS.parent, DOCS / "tutorials"
    pages = [p for p in (*root.glob("*.md"), *DOCS.rglob("*.md")) if "generated" not in p.parts]
    pages += (root / "benchmarks").glob("*.md")
    found = 0
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.DOTALL)
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
            if link.startswith("../../actions/workflows/"):  # which GitHub has beside the files
                assert (root / ".github/workflows" / link.split("/")[4]).is_file(), link
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if target.parent == tutorials:
                target = target.with_suffix(".py")  # of which the page is made
            if "results" in target.parts and not (DOCS / "results").is_dir():
                continue  # an sdist
            assert target.exists(), f"{page}: {link}"
            if anchor:
                assert anchor in heading_anchors(target.read_text("utf-8")), f"{page}: {link}"
            found += 1
    assert found > 90


def test_every_page_is_reached() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for path in DOCS.rglob("*.md"):
        name = str(path.relative_to(DOCS).with_suffix(""))
        if name != "index":
            assert re.search(rf"^(?:.*<)?{re.escape(name)}>?$", index, re.MULTILINE), name


def test_every_variable_that_is_read_is_in_the_table() -> None:
    table = (DOCS / "environment.md").read_text(encoding="utf-8")
    root, reads = DOCS.parent, set()
    reader = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["'](KNNEXT_\w+)""")
    for folder in ("knnext", "csrc", "tests"):
        for path in (root / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                reads |= set(reader.findall(path.read_text(encoding="utf-8")))
    reads |= set(reader.findall((root / "setup.py").read_text(encoding="utf-8")))
    # Shells read what they expand, and hand on what they set.
    shell = re.compile(r"\$\$?\{?(KNNEXT_\w+)|\b(KNNEXT_\w+)=")
    scripts = [root / "Makefile", root / ".ci" / "run", *(root / "benchmarks").glob("*.sh")]
    scripts += [*(root / ".github").rglob("*.yml"), *(root / "tools").rglob("*")]
    for path in scripts:
        if path.is_file() and path.suffix in ("", ".sh", ".yml", ".py"):
            pairs = shell.findall(path.read_text(encoding="utf-8"))
            reads |= {name for pair in pairs for name in pair if name}
    # What programs of the tests tell each other.
    reads -= {name for name in reads if name.startswith("KNNEXT_TEST_")}
    assert len(reads) > 4
    assert {name for name in reads if f"`{name}`" not in table} == set()
