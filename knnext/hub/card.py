"""The card of a datastore: a README.md made from what ``meta.json`` says, and from nothing else.

What is made stands between two marks. Text that somebody writes around them stays when the
datastore is pushed again.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import PurePath
from typing import Any

from knnext.datastore.meta import DTYPE_NAMES, DatastoreMeta
from knnext.datastore.meta_file import to_json
from knnext.say import as_typed, binary_size, shown

_BEGIN, _END = "<!-- made by knnext from meta.json -->", "<!-- end of what knnext made -->"
_FRONT = re.compile(r"\A---\n.*?^---\n", flags=re.DOTALL | re.MULTILINE)
_SIZES = (
    *((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")),
    *((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B")),
)


def make_card(
    repo_id: str,
    meta: DatastoreMeta,
    *,
    fingerprint: str,
    groups: tuple[str, ...],
    num_bytes: int,
    license: str | None = None,
) -> str:
    """The whole README.md of a repository that has none."""
    body = _body(repo_id, meta, fingerprint, groups, num_bytes, license)
    return f"{_front(repo_id, meta, license)}\n{_BEGIN}\n{body}{_END}\n"


def renew(old: str, new: str, *, license: str | None) -> str | None:
    """``old`` with what is between its marks from ``new``; None where it has no marks.

    Its front matter stays too, unless a licence is given for it.
    """
    begin, end = old.find(_BEGIN), old.find(_END)
    if begin < 0 or end < begin:
        return None
    fresh = new[new.find(_BEGIN) : new.find(_END)]
    text = old[:begin] + fresh + old[end:]
    front = _FRONT.match(new) if license else None
    assert front is not None or not license
    return text if front is None else front[0] + _FRONT.sub("", text, count=1)


def licence_of(text: str) -> str | None:
    """What a card's front matter states as its licence, in one line; None where it does not."""
    front = _FRONT.match(text)
    found = re.search(r"^license: *(\S.*)$", front[0], flags=re.MULTILINE) if front else None
    return None if found is None else found[1].strip().strip("\"'")


def _front(repo_id: str, meta: DatastoreMeta, license: str | None) -> str:
    facts: dict[str, Any] = {} if license is None else {"license": license}
    facts |= {
        "pretty_name": f"Datastore {repo_id.rpartition('/')[2]}",
        "library_name": "knnext",
        "tags": ["knnext", "knn-lm", "datastore"],
        "size_categories": [
            next((name for most, name in _SIZES if meta.num_entries < most), "n>1T")
            if meta.num_entries < 10**10
            else ("10B<n<100B" if meta.num_entries < 10**11 else "100B<n<1T")
        ],
        "viewer": False,  # keys and values are no tables
    }
    # JSON's scalars and lists are YAML's.
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in facts.items()]
    return "\n".join(["---", *lines, "---", ""])


def _body(
    repo_id: str,
    meta: DatastoreMeta,
    fingerprint: str,
    groups: tuple[str, ...],
    num_bytes: int,
    license: str | None,
) -> str:
    name = repo_id.rpartition("/")[2]
    rows = {
        "rows": f"{meta.num_entries:,}",
        "keys": f"{meta.dim:,} numbers of {DTYPE_NAMES[meta.dtype]}, of layer `{meta.key_layer}`",
        "values": "the token that followed, int32",
        "metric": meta.metric,
        "model": public(meta.model_id),
        "model revision": meta.model_revision,
        "tokenizer": meta.tokenizer_hash,
        "vocabulary": None if meta.vocab_size is None else f"{meta.vocab_size:,}",
        "corpus": public(meta.corpus),
        "split": None if meta.text is None else str(meta.text.get("split")),
        "documents": "not kept" if meta.documents is None else f"{meta.documents.count:,}",
        "made": f"{meta.created} by knnext {meta.knnext_version}",
        "bytes": f"{num_bytes:,} ({binary_size(num_bytes)})",
        "beside it": ", ".join(groups) or "nothing",
        "licence": license or "not stated by whoever sent it",
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    digest = hashlib.sha256(to_json(meta)).hexdigest()
    folder = _cell(as_typed(name))
    return f"""# Datastore {_cell(name)}

Keys and values of a kNN language model, for the Python package knnext: for every token
of a text, the state of a language model before it and the token itself.

| | |
|---|---|
{table}

What is "unknown" was not told when the datastore was made. The licences of the model and of the
text hold for what was made of them; they are not repeated here.

## Open it

```python
from knnext.datastore import Datastore

store = Datastore.from_hub("{repo_id}")
```

or `knnext pull {repo_id} {folder}`, and then `knnext eval {folder} --model ...` with the
very model named above: another one is refused.

## What it tells

**A datastore is its text.** Keys and values give it back token by token; whoever may read these
files may read the text. Nothing in them is code, and nothing is unpickled.

## Checksums

Length and CRC-32 of every file stand in `meta.json` and are compared when it is fetched, and by
`knnext info --verify` again. The datastore's fingerprint is `{fingerprint}`, the SHA-256 of
`meta.json` is `{digest}`.
"""


def public(text: str | None) -> str | None:
    """Of a path on the sender's machine the last name, as the rest tells of the machine alone."""
    return PurePath(text).name if text is not None and is_path(text) else text


def is_path(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../"))


def _cell(value: str | None) -> str:
    """In a table, as text and not as marks of it."""
    text = shown(value or "unknown")
    return re.sub(r"([|<>\[\]])", r"\\\1", text)
