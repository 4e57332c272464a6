"""A text that is scored must not lie in the datastore: found by hash, by tokens, by name."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnext.corpus import Document, TokenizedDocuments
from knnext.datastore import CorruptDatastoreError, Datastore, IncompatibleDatastoreError
from knnext.datastore.overlap import OverlapError, check_overlap, common_documents

DIM = 4
FIXTURE = Path(__file__).parent / "fixtures" / "datastore_v1"


def document(number: int) -> list[int]:
    return np.random.default_rng(number).integers(1, 50, 40).tolist()


def content(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def stream(documents: dict[str, list[int]], *, hashed: bool = True, head: int = 10**6) -> Any:
    """As `tokenize` makes it: 0 before each document, hashes of the whole."""
    parts = [[0, *tokens[:head]] for tokens in documents.values()]
    offsets = np.cumsum([0, *map(len, parts)])
    hashes = [Document("", content(tokens)).content_hash for tokens in documents.values()]
    ones = np.ones(len(parts), np.int64)
    return TokenizedDocuments(
        np.concatenate(parts).astype(np.int32),
        offsets,
        list(documents),
        ones,
        ones,
        np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16) if hashed else None,
    )


def stored(path: Path, stream: TokenizedDocuments, **options: Any) -> Datastore:
    with Datastore.create(path, DIM, vocab_size=50, **options) as store:
        store.set_document_names(stream.names, stream.hashes)
        values = torch.from_numpy(stream.tokens[1:].copy())
        documents = stream.document_of(np.arange(len(values)) + 1)
        store.append(torch.randn(len(values), DIM), values, documents)
    return Datastore.open(path, verify=True)


TRAIN = {f"d{i}": document(i) for i in range(12)}


def edited(tokens: list[int]) -> list[int]:
    return [*tokens[:20], 7, *tokens[21:], 3, 4]


SCORED = {
    "the same": ({"d3": document(3), "new": document(90)}, ["d3"]),
    "renamed": ({"other": document(3), "new": document(90)}, ["other"]),
    "the first, renamed": ({"other": document(0)}, ["other"]),
    "edited": ({"d3": edited(document(3)), "new": document(90)}, ["d3"]),
    "another of that name": ({"d3": document(91), "d4": document(92)}, []),
    "new": ({"new": document(90), "newer": document(93)}, []),
}


@pytest.mark.parametrize("kept", [True, False], ids=["hashes", "before hashes"])
@pytest.mark.parametrize("head", [10**6, 20], ids=["whole", "heads"])
@pytest.mark.parametrize("case", SCORED)
def test_what_is_found(tmp_path: Path, case: str, head: int, kept: bool) -> None:
    documents, wanted = SCORED[case]
    store = stored(tmp_path / "ds", stream(TRAIN, hashed=kept))
    assert (store.document_hashes is not None) == kept
    for scored in (stream(documents, head=head), stream(documents, head=head, hashed=False)):
        assert common_documents(store, scored) == wanted
    if wanted:
        with pytest.raises(OverlapError, match=rf"1 of the .* \({wanted[0]}\).*--allow-overlap"):
            check_overlap(store, scored)
        number = store.document_names.index("d3") if wanted != ["other"] else None
        if number is not None:
            check_overlap(store, scored, without=[number])
    else:
        check_overlap(store, scored)


def test_documents_are_carried_through_merges_and_samples(tmp_path: Path) -> None:
    halves = [dict(list(TRAIN.items())[:6]), dict(list(TRAIN.items())[6:])]
    parts = [stored(tmp_path / f"part{i}", stream(half)) for i, half in enumerate(halves)]
    scored = stream({"renamed": document(8), "new": document(90)})
    merged = Datastore.merge(parts, tmp_path / "merged")
    assert common_documents(merged, scored) == ["renamed"]
    sample = merged.subsample(0.5, 0, tmp_path / "sample")
    assert common_documents(sample, scored) == ["renamed"]
    assert np.array_equal(sample.document_hashes, merged.document_hashes)
    # What has no rows in a view is not in it.
    assert common_documents(merged.shard(0, 2), scored) == []
    assert common_documents(merged.shard(1, 2), scored) == ["renamed"]


def test_a_merge_with_a_store_of_before_knows_what_it_can(tmp_path: Path) -> None:
    new = stored(tmp_path / "new", stream({"a": document(1)}))
    old = stored(tmp_path / "old", stream({"b": document(2), "c": document(3)}, hashed=False))
    merged = Datastore.merge([new, old], tmp_path / "merged")
    hashes = merged.document_hashes
    assert hashes is not None and hashes[0].any() and not hashes[1:].any()
    assert common_documents(merged, stream({"x": document(1), "b": document(2)})) == ["x", "b"]
    both_old = Datastore.merge([old, old], tmp_path / "both old")
    assert both_old.document_hashes is None


def test_a_sample_without_hashes_goes_by_names(tmp_path: Path) -> None:
    old = stored(tmp_path / "old", stream(TRAIN, hashed=False)).subsample(0.5, 0, tmp_path / "s")
    assert common_documents(old, stream({"d3": document(3), "x": document(4)})) == ["d3"]


def test_an_extension_is_known_too(tmp_path: Path) -> None:
    stored(tmp_path / "ds", stream({"a": document(1)}))
    text = stream({"a": document(1), "b": document(2)})
    with Datastore.create(tmp_path / "ds", DIM, vocab_size=50, resume=True) as store:
        store.set_document_names(text.names, text.hashes)
        values = torch.from_numpy(text.tokens[1:][store.num_entries :].copy())
        store.append(torch.randn(len(values), DIM), values, [1] * len(values))
    assert common_documents(Datastore.open(tmp_path / "ds"), stream({"x": document(2)})) == ["x"]
    with Datastore.create(tmp_path / "ds", DIM, vocab_size=50, resume=True) as store:
        store.append(torch.zeros(2, DIM), [1, 2], [2, 2])  # nobody told a hash
    hashes = Datastore.open(tmp_path / "ds", verify=True).document_hashes
    assert hashes is not None and hashes.shape == (3, 16) and not hashes[2].any()


def test_hashes_must_be_those_of_the_build_so_far(tmp_path: Path) -> None:
    text = stream({"a": document(1), "b": document(2)})
    stored(tmp_path / "ds", text)
    with Datastore.create(tmp_path / "ds", DIM, vocab_size=50, resume=True) as store:
        with pytest.raises(ValueError, match="'b' is stored with another text"):
            store.set_document_names(text.names, stream({"a": document(1), "b": [5]}).hashes)
        for wrong in (text.hashes[:1], text.hashes.astype(np.int32), text.hashes[:, :8]):
            with pytest.raises(ValueError, match=r"want uint8 of \(2, 16\)"):
                store.set_document_names(text.names, wrong)


def test_a_store_without_documents_says_that_it_cannot_tell(tmp_path: Path) -> None:
    with Datastore.create(tmp_path / "ds", DIM) as store:
        store.append(torch.zeros(3, DIM), [1, 2, 3])
    with pytest.warns(UserWarning, match="keeps no documents"):
        check_overlap(Datastore.open(tmp_path / "ds"), stream({"a": document(1)}))


def test_a_store_of_before_opens_extends_and_keeps_its_fingerprint(tmp_path: Path) -> None:
    from knnext.datastore.meta_file import to_json

    shutil.copytree(FIXTURE, tmp_path / "v1")
    store = Datastore.open(tmp_path / "v1")
    assert store.document_hashes is None and store.meta.text is None
    assert to_json(store.meta) == (FIXTURE / "meta.json").read_bytes()


def test_damage_to_the_hashes_is_seen(tmp_path: Path) -> None:
    path = stored(tmp_path / "ds", stream(TRAIN)).path / "document-hashes.bin"
    content = path.read_bytes()
    assert len(content) == 16 * len(TRAIN)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CorruptDatastoreError, match=r"document-hashes\.bin: its content"):
        Datastore.open(path.parent, verify=True)
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptDatastoreError, match=r"document-hashes\.bin: truncated"):
        Datastore.open(path.parent)


FACTS = {"corpus": "/notes", "split": "train", "seed": 7, "shares": [80.0, 10.0, 10.0]}


def test_the_split_is_kept_and_another_refused(tmp_path: Path) -> None:
    facts = {**FACTS, "documents": "aa"}
    text = stream({"a": document(1)})
    store = stored(tmp_path / "ds", text, text=facts, corpus="/notes")
    assert store.meta.text == facts
    with pytest.raises(IncompatibleDatastoreError, match="seed: datastore has 7, asked for 8"):
        Datastore.create(
            tmp_path / "ds", DIM, text={**facts, "seed": 8, "documents": "bb"}, resume=True
        )
    with pytest.raises(IncompatibleDatastoreError, match="documents have changed"):
        Datastore.create(tmp_path / "ds", DIM, text={**facts, "documents": "bb"}, resume=True)
    # The same documents in another place are the same text.
    moved = {"text": {**facts, "corpus": "/moved"}, "corpus": "/moved", "vocab_size": 50}
    Datastore.create(tmp_path / "ds", DIM, resume=True, **moved).close()
    assert Datastore.open(tmp_path / "ds").meta.text == facts
    with pytest.raises(TypeError, match="text: got 'seed'"):
        Datastore.create(tmp_path / "bad", DIM, text={"seed": {}})


def test_merges_keep_what_all_agree_on(tmp_path: Path) -> None:
    def part(name: str, **changes: Any) -> Datastore:
        facts = {**FACTS, "max_bytes": None, "documents": name, **changes}
        return stored(tmp_path / name, stream({name: document(1)}), text=facts, corpus="/notes")

    train, valid = part("t"), part("v", split="valid")
    merged = Datastore.merge([train, valid], tmp_path / "tv").meta.text
    assert merged is not None and (merged["split"], merged["seed"]) == ("train+valid", 7)
    assert merged["documents"] is None
    again = Datastore.merge([train, train], tmp_path / "tt").meta.text
    assert again == train.meta.text
    assert Datastore.merge([train, part("s", seed=8)], tmp_path / "ts").meta.text is None
    sample = train.subsample(0.5, 0, tmp_path / "half")
    assert sample.meta.text == train.meta.text
