"""The documentation site: `make docs`. Sphinx, with Markdown by MyST and the theme furo.

Sphinx and not MkDocs: it reads the API out of the package itself, checks every reference, runs the
tutorials, and its parts have been kept for ten years by more than one person. The pages of the API
and of the command line are generated: by docstrings and parser, and never written into the
repository. So are those of the tutorials, which are programs in cells (jupytext's percent format),
and those of the benchmarks, which lie beside what they tell of.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GENERATED = HERE / "reference" / "generated"
TUTORIALS = HERE / "tutorials"
#: Pages that lie elsewhere, by the names that they have on the site.
ELSEWHERE = {"benchmarks": "benchmarks/README.md", "benchmarks-log": "benchmarks/LOG.md"}
sys.path.insert(0, str(HERE.parent))
os.environ["COLUMNS"] = "90"  # by which argparse breaks its lines

#: Modules whose names are promised to users, in the order of the data's way, and their headings.
PUBLIC = {
    "knnext": "knnext: the ops, and what everyone uses",
    "knnext.errors": "knnext.errors: what can go wrong",
    "knnext.corpus": "knnext.corpus: texts and token streams",
    "knnext.lm.load": "knnext.lm.load: models from disk or a hub",
    "knnext.lm.hidden_states": "knnext.lm.hidden_states: keys and queries",
    "knnext.lm.knnlm": "knnext.lm.knnlm: a model that looks things up",
    "knnext.lm.train": "knnext.lm.train: small models of one's own",
    "knnext.datastore": "knnext.datastore: keys and values on disk",
    "knnext.datastore.build": "knnext.datastore.build: from a model to a datastore",
    "knnext.index": "knnext.index: searching a datastore",
    "knnext.evaluation": "knnext.evaluation: perplexity",
    "knnext.evaluation.tune": "knnext.evaluation.tune: temperature and lmbda",
    "knnext.hub": "knnext.hub: datastores on the Hugging Face Hub",
    "knnext.distill": "knnext.distill: what the neighbors say, as data",
    "knnext.report": "knnext.report: the page",
    "knnext.planning": "knnext.planning: sizes and times beforehand",
    "knnext.experiments": "knnext.experiments: the paper's",
    "knnext.ranks": "knnext.ranks: several processes",
}

project = "knnext"
author = "the knnext developers"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "knnext"
html_show_copyright = False
default_role = "code"  # docstrings speak Markdown's single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
suppress_warnings = ["myst.header"]


def public_names(module: str) -> list[str]:
    """Names of functions, classes and values that a public module promises, in its own order."""
    found: Any = importlib.import_module(module)
    if hasattr(found, "__all__"):
        return list(found.__all__)
    return [
        name
        for name, value in vars(found).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module
        and (inspect.isclass(value) or inspect.isfunction(value))
    ]


def _heading(text: str, line: str = "=") -> list[str]:
    return [text, line * len(text), ""]


def module_page(module: str, seen: set[int]) -> str:
    """reStructuredText of one module; what an earlier page has is referred to."""
    lines = [*_heading(PUBLIC[module]), f".. automodule:: {module}", ""]
    for name in public_names(module):
        value = getattr(importlib.import_module(module), name)
        callable_here = inspect.isclass(value) or inspect.isfunction(value)
        if callable_here and id(value) in seen:
            continue
        seen.add(id(value))
        if not callable_here:
            lines += [f".. py:data:: {module}.{name}", f"   :type: {type(value).__name__}", ""]
            continue
        kind = "autofunction"
        if inspect.isclass(value):
            error = issubclass(value, BaseException)
            kind = "autoexception" if error else "autoclass"
        lines += [f".. {kind}:: {module}.{name}"]
        if kind == "autoclass":
            lines += ["   :members:", "   :show-inheritance:"]
        lines.append("")
    return "\n".join(lines)


def command_page() -> str:
    """reStructuredText of every command's help."""
    from knnext.cli.parser import build_parser

    parser = build_parser()
    lines = _heading("knnext: the command line")
    lines += ["Generated from the parser; :doc:`/cli` tells what the commands are for.", ""]
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in [("knnext", parser), *commands.choices.items()]:
        lines += _heading(name, "-")
        lines += [".. code-block:: text", ""]
        lines += [f"   {line}".rstrip() for line in command.format_help().splitlines()]
        lines.append("")
    return "\n".join(lines)


def tutorial_page(script: Path) -> str:
    """Markdown of a tutorial: its cells of words as they are, those of code as blocks."""
    parts: list[str] = []
    for cell in script.read_text(encoding="utf-8").split("# %%")[1:]:
        kind, _, text = cell.partition("\n")
        if "markdown" in kind:
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.split("\n"))
            parts.append(text.strip())
        else:
            parts.append(f"```python\n{text.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def page_from_elsewhere(source: Path) -> str:
    """A Markdown page of another folder, with the links that it has there."""
    names = {HERE.parent / path: f"{name}.md" for name, path in ELSEWHERE.items()}

    def link(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        return f"]({names.get(target) or os.path.relpath(target, GENERATED)})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", link, source.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def generate(*_: Any) -> None:
    """Write the pages of the reference."""
    seen: set[int] = set()
    for module in PUBLIC:
        _write(GENERATED / f"{module}.rst", module_page(module, seen))
    _write(GENERATED / "commands.rst", command_page())
    for script in sorted(TUTORIALS.glob("*.py")):
        _write(script.with_suffix(".md"), tutorial_page(script))
    for name, path in ELSEWHERE.items():
        _write(GENERATED / f"{name}.md", page_from_elsewhere(HERE.parent / path))
    toc = [*_heading("Reference"), ".. toctree::", ""]
    toc += [f"   {name}" for name in (*PUBLIC, "commands")]
    _write(GENERATED / "index.rst", "\n".join([*toc, ""]))


def plain_bars(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A formula's |x| is no substitution."""
    lines[:] = [line.replace("|", "\\|") if "`" not in line else line for line in lines]


_SAID: dict[str, list[str]] = {}


def keep(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    _SAID[name] = list(lines)


def as_said(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Of an attribute: napoleon takes what stands before its first colon for a type."""
    if what in ("attribute", "property"):
        lines[:] = _SAID[name]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", keep, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", as_said, priority=600)
    app.connect("autodoc-process-docstring", plain_bars)
    app.connect("builder-inited", generate)
