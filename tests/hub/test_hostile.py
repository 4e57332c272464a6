"""Whatever stands in the JSON files of a repository: refused in a sentence, or of use."""

from __future__ import annotations

import contextlib
import copy
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from knnext.cli.text import _kept
from knnext.datastore import Datastore, DatastoreError
from knnext.datastore.meta_file import from_json
from knnext.hub import HubError
from knnext.hub.layout import check_fit, codes_items, index_items, row_items
from knnext.hub.remote import trusted_meta
from tests.datastore import small
from tests.hub.stored import FIT

GONE = object()
WRONG: list[Any] = [
    *(None, True, -1, 10**30, 1.5, float("inf"), float("nan"), "", "../x", "\x1b[31m", [], [[0]]),
    *({"a": 1}, [["a", 10**9]], GONE),
]
#: Which a datastore may have, and the small one of these tests has not.
MORE = {
    "text": {"split": "train", "seed": 1, "shares": [0.9, 0.05, 0.05], "max_bytes": None},
    "origin": {"made": "by hand"},
    "model": {"dtype": "bfloat16"},
    "audit": [{"what": "compact"}],
}


def signed(body: dict[str, Any]) -> bytes:
    body.pop("checksum", None)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "checksum": f"crc32:{zlib.crc32(text.encode()):08x}"}).encode()


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(value, dict):
        for name, one in value.items():
            yield from places(one, (*at, name))
    elif isinstance(value, list):
        for number, one in enumerate(value[:2]):
            yield from places(one, (*at, number))


def changed(content: bytes, **more: Any) -> Iterator[tuple[str, bytes]]:
    """The file with one value after the other replaced by each of the wrong ones."""
    body = json.loads(content) | more
    for at in places(body):
        for new in WRONG:
            other = copy.deepcopy(body)
            owner = other
            for step in at[:-1]:
                owner = owner[step]
            if new is GONE:
                del owner[at[-1]]
            else:
                owner[at[-1]] = new
            unsigned = "checksum" not in body
            yield f"{at} = {new!r}", json.dumps(other).encode() if unsigned else signed(other)


@pytest.mark.parametrize("kind", ["plain", "parts", "deleted"])
def test_a_meta_with_any_wrong_value_is_used_or_refused(
    kind: str, stores: dict[str, Datastore], tmp_path: Path
) -> None:
    if kind == "deleted":
        store = Datastore.open(small.write(tmp_path / "S", 40))
        store.delete([0])
    else:
        store = stores[kind]
    content = (store.path / "meta.json").read_bytes()
    refused = 0
    for what, wrong in changed(content, **MORE):
        try:
            with pytest.raises(HubError, match=r"^org/x: ") as caught:
                meta = trusted_meta(wrong, "org/x")
                row_items(meta)
                found = Datastore(tmp_path, meta)
                said, _ = found.describe(), found.fingerprint
                assert said.replace("\n", "").isprintable()
                raise HubError("org/x: it can be read")
        except BaseException as error:
            raise AssertionError(what) from error
        assert len(str(caught.value)) < 500 and str(caught.value).isprintable(), what
        refused += "it can be read" not in str(caught.value)
        with contextlib.suppress(DatastoreError):
            from_json(wrong, tmp_path / "meta.json")
    assert refused > 300


@pytest.mark.parametrize("kind", ["codes", "index", "fit"])
def test_what_lies_beside_it_is_used_or_refused(kind: str, stores: dict[str, Datastore]) -> None:
    store = stores["plain"]
    read: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
        "codes": (
            store.path.with_name("S.codes").joinpath("codes.json").read_bytes(),
            lambda content: codes_items(content, store.fingerprint),
        ),
        "index": (
            store.path.with_name("S.index").joinpath("index.json").read_bytes(),
            lambda content: index_items(content, store.fingerprint),
        ),
        "fit": (json.dumps(FIT).encode(), lambda content: check_fit(content, "here")),
    }
    content, use = read[kind]
    refused = 0
    for what, wrong in changed(content):
        try:
            use(wrong)
        except ValueError:  # of which our own errors are
            refused += 1
        except Exception as error:
            raise AssertionError(what) from error
    assert refused > 50


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000])
def test_a_nest_is_no_meta(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DatastoreError, match="not JSON"):
        from_json(content, tmp_path / "meta.json")


NEST = "[" * 100_000


@pytest.mark.parametrize("config", ["", "{", "[]", "5", NEST, '{"a": 1}'])
def test_a_model_whose_config_is_none(config: str, tmp_path: Path) -> None:
    with small.begin(tmp_path / "S", model={"config": config}) as store:
        store.append(*small.rows(0, 20))
    asked = {"config": '{"a": 2}'}
    if config == '{"a": 1}':
        with pytest.raises(DatastoreError, match="config: datastore has a 1, asked for 2"):
            store.check_compatible(model=asked)
    else:
        store.check_compatible(model=asked)


FACTS = {**MORE["text"], "corpus": "x", "text_column": "c", "errors": "d", "documents": None}


@pytest.mark.parametrize(
    "change", [{"corpus": 5}, {"errors": 1}, {"seed": "b"}, {"shares": [1.0]}, {"split": None}]
)
def test_a_text_that_no_build_describes_so(change: dict[str, Any], tmp_path: Path) -> None:
    for name, text in (("S", FACTS | change), ("T", FACTS), ("U", {"split": "train"})):
        with small.begin(tmp_path / name, text=text) as store:
            store.append(*small.rows(0, 20))
        assert (_kept(Datastore.open(tmp_path / name)) is not None) == (name == "T")


@pytest.mark.parametrize("line", [NEST, "5", '"a', '"a"\n"b"', "", "null"])
def test_names_that_are_none(line: str, tmp_path: Path) -> None:
    """With a right length and checksum: whoever writes files can write those."""
    folder = small.write(tmp_path / "S", 20)
    names = f'"0"\n{line}\n'.encode()
    (folder / "document-names.jsonl").write_bytes(names)
    body = json.loads((folder / "meta.json").read_bytes())
    body["documents"]["names"] |= {
        "num_bytes": len(names), "checksum": f"crc32:{zlib.crc32(names):08x}"
    }  # fmt: skip
    (folder / "meta.json").write_bytes(signed(body))
    store = Datastore.open(folder, verify=True)
    with pytest.raises(DatastoreError, match=r"document-names\.jsonl"):
        list(store.document_names)
