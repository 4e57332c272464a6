"""An index for pip, out of the checksums of releases: folders of HTML that any server can hold.

    python tools/index.py RELEASES --url 'https://host/downloads/{tag}/{file}' --out simple

RELEASES has one folder a tag, each with a SHA256SUMS as `sha256sum` writes it; the files themselves
may lie elsewhere, where ``--url`` says. Then

    pip install "knnext==0.1.0+cu130" --extra-index-url https://host/simple/

The label must be named: it says which CUDA is wanted, and no public registry takes a version with a
label, so that nobody else's package can come in its place.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import quote

PACKAGE = "knnext"
PAGE = """<!DOCTYPE html>
<html><head><meta name="pypi:repository-version" content="1.0"><title>{title}</title></head>
<body>
{links}
</body></html>
"""


def read_sums(path: Path) -> dict[str, str]:
    """File names and their SHA-256, of what pip can install."""
    sums = {}
    for line in path.read_text().splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})[ *]+([^/]+)", line)
        if match is None:
            sys.exit(f"{path}: {line!r} is no line of sha256sum with a file's bare name")
        if match[2].endswith((".whl", ".tar.gz")):
            sums[match[2]] = match[1]
    return sums


def requires_python() -> str:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    found = re.search(r'^requires-python = "(.+)"$', text, flags=re.MULTILINE)
    assert found is not None
    return found[1]


def links(releases: Path, url: str) -> list[str]:
    lines = []
    for sums in sorted(releases.glob("*/SHA256SUMS")):
        for name, digest in sorted(read_sums(sums).items()):
            if not name.startswith((f"{PACKAGE}-",)):
                sys.exit(f"{sums}: {name} is no file of {PACKAGE}")
            target = url.format(tag=quote(sums.parent.name), file=quote(name))
            lines.append(
                f'<a href="{html.escape(target)}#sha256={digest}" '
                f'data-requires-python="{html.escape(requires_python())}">{html.escape(name)}</a>'
                "<br>"
            )
    return lines


def write(out: Path, releases: Path, url: str) -> int:
    """The two pages; how many files they link to."""
    found = links(releases, url)
    shutil.rmtree(out, ignore_errors=True)
    (out / PACKAGE).mkdir(parents=True)
    root = f'<a href="{PACKAGE}/">{PACKAGE}</a>'
    (out / "index.html").write_text(PAGE.format(title="Simple index", links=root))
    page = PAGE.format(title=f"Links for {PACKAGE}", links="\n".join(found))
    (out / PACKAGE / "index.html").write_text(page)
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("releases", type=Path, help="a folder with TAG/SHA256SUMS")
    parser.add_argument("--url", required=True, help="with {tag} and {file}")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not args.releases.is_dir():
        sys.exit(f"{args.releases} is no folder of releases")
    print(f"{args.out}: {write(args.out, args.releases, args.url)} files")


if __name__ == "__main__":
    main()
