"""The commands that make a datastore or look at one: build, index, import, info."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.cli.session import open_datastore, open_model
from knnext.cli.text import text_to_store
from knnext.launch import launched
from knnext.say import Say, binary_size

if TYPE_CHECKING:
    from knnext.corpus import SplitFacts
    from knnext.datastore import Datastore
    from knnext.index import FaissIndex, StoredCodes

_OF_FAISS = ("index_path", "factory", "train_size", "nprobe", "seed", "adopt")


def build(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    import torch

    from knnext.datastore.build import build_datastore, key_width, settled
    from knnext.datastore.room import check_room, free_bytes, row_bytes
    from knnext.index.codes_meta import STATS_BYTES
    from knnext.lm.windows import Windows

    if args.part is not None and args.codes:
        raise ValueError(
            "--codes are of the whole datastore: when all parts are there, `knnext index "
            f"{args.datastore} --kind codes` makes them, also with --part or --parts"
        )
    model, tokenizer = open_model(args, _begun(args.datastore))
    text, facts = text_to_store(args, tokenizer)
    rows, key_dtype = max(0, len(text) - 1), getattr(torch, args.key_dtype)
    width = key_width(model, args.key_layer)
    size = row_bytes(width, key_dtype) + (width + STATS_BYTES if args.codes else 0)
    said = " with its codes" if args.codes else ""
    say(
        f"{rows:,} tokens to store, of {text.num_documents:,} documents: the datastore{said} takes "
        f"{binary_size(rows * size)} ({size:,} bytes a row), "
        f"{binary_size(free_bytes(args.datastore))} are free"
    )
    check_room(args.datastore, rows, size, said)
    alone = args.part is None and args.parts is None and launched()[1] == 1
    given = (args.block_size, args.stride, args.batch_size)
    grid: dict[str, Any] = settled(model, args.datastore, *given, alone=alone)
    offsets = text.document_offsets if args.separate_documents else None
    windows = Windows.over(len(text), grid["block_size"], grid["stride"], offsets)
    say(f"{windows.describe()}; {grid['batch_size']} windows at once")
    store = build_datastore(
        model,
        tokenizer,
        text,
        args.datastore,
        key_layer=args.key_layer,
        metric=args.metric,
        key_dtype=key_dtype,
        **grid,
        corpus=_as_before(args.datastore, facts),
        bos_each_window=args.bos_each_window,
        separate_documents=args.separate_documents,
        part=args.part,
        parts=args.parts,
        rank=launched(),
    )
    say(store.describe())
    if args.part is not None and store.path != Path(args.datastore):
        say(_left(args.datastore))
    return facts_of(store) | (_encode_as_built(args, store, say) if args.codes else {})


def _left(datastore: str) -> str:
    """What a datastore lacks after one of its parts has been built."""
    from knnext.datastore.meta import BUILD_FILE
    from knnext.datastore.meta_file import not_joined, read_meta

    folder = Path(datastore)
    return not_joined(folder, read_meta(folder, BUILD_FILE))


def _as_before(datastore: str, facts: SplitFacts) -> SplitFacts | str:
    """The facts; or the name, where a build from before they were kept goes on under it."""
    from knnext.corpus import absolute_spec

    begun = _begun(datastore)
    if begun is None:
        return facts
    meta = begun.meta
    old = meta.corpus if meta.text is None else None
    return old if old is not None and absolute_spec(old) == facts.corpus else facts


def _begun(datastore: str) -> Datastore | None:
    """What an earlier build left in the folder, finished or not."""
    from knnext.datastore import Datastore, DatastoreError

    try:
        return Datastore.open(datastore, allow_unfinished=True)
    except (DatastoreError, OSError):
        return None


def index(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    if args.kind == "codes":
        return _encode(args, say)
    from knnext.index import FaissIndex

    store = open_datastore(args)
    options: dict[str, Any] = {
        "train_size": args.train_size,
        "nprobe": args.nprobe,
        "seed": 1 if args.seed is None else args.seed,
    }
    if args.adopt is not None:
        built = _adopt(args, store, args.adopt, say)
    elif args.part is not None:
        _check_part(args)
        part = FaissIndex.build_part(store, args.part, args.index_path, args.factory, **options)
        if part is None:
            return _say_part(args, say)
        built = part
    else:
        options |= {"overwrite": args.overwrite, "parts": args.parts, "rank": launched()}
        built = FaissIndex.build(store, args.index_path, args.factory, **options)
    facts = {
        "path": str(built.path),
        "factory": built.factory,
        "nprobe": built.nprobe,
        "num_entries": built.datastore.num_entries,
        "num_bytes": built.num_bytes,
    }
    _say_facts(facts, say)
    return facts


def _adopt(args: argparse.Namespace, store: Datastore, file: str, say: Say) -> FaissIndex:
    """Take the index of another program."""
    from knnext.index import FaissIndex

    building = ("factory", "train_size", "seed", "parts", "part")
    given = [name for name in building if getattr(args, name, None) is not None]
    if given:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} is for building an index; --adopt takes one as it is")
    options = {name: getattr(args, name, None) for name in ("nprobe", "overwrite")}
    found = FaissIndex.adopt(
        store,
        file,
        getattr(args, "index_path", None),
        nprobe=options["nprobe"],
        overwrite=bool(options["overwrite"]),
    )
    for name, value in (found.sidecar.adopted or {}).items():
        say(f"{name:<18}{'not to be told' if value is None else value}")
    return found


def _encode(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.index import StoredCodes

    given = [name for name in _OF_FAISS if getattr(args, name) is not None]
    if given:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} is for --kind faiss: codes leave nothing to choose")
    store = open_datastore(args)
    if args.part is not None:
        _check_part(args)
        if StoredCodes.build_part(store, args.part) is None:
            return _say_part(args, say)
    codes = StoredCodes.build(store, overwrite=args.overwrite, parts=args.parts, rank=launched())
    facts = _code_facts(codes)
    _say_facts(facts, say)
    return facts


def _check_part(args: argparse.Namespace) -> None:
    if args.overwrite:
        raise ValueError(
            "--overwrite is for one process, as each of several would discard what the others have "
            "made: leave it out, and remove what is there first"
        )


def _say_part(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    number, count = args.part
    say(f"part {number} of {count} is there; the last one joins them, or `knnext join`")
    return {"part": number, "parts": count, "joined": False}


def _encode_as_built(args: argparse.Namespace, store: Datastore, say: Say) -> dict[str, Any]:
    """Codes of what was built; those of a datastore that was here before it are of no use."""
    from knnext.index import StoredCodes

    rank = launched()
    if args.parts is None and rank[1] == 1:
        codes = StoredCodes.renew(store)
    else:
        codes = StoredCodes.build(store, parts=args.parts, rank=rank)
    say(f"{'codes':<12}{codes.path}, {binary_size(codes.nbytes)}")
    return {"codes": _code_facts(codes)}


def _code_facts(codes: StoredCodes) -> dict[str, Any]:
    return {"path": str(codes.path), "num_entries": len(codes), "num_bytes": codes.nbytes}


def import_legacy(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    import torch

    from knnext.datastore import Datastore
    from knnext.progress import Progress

    dtypes: dict[str, Any] = {
        name: None if (chosen := getattr(args, name)) is None else getattr(torch, chosen)
        for name in ("key_dtype", "value_dtype")
    }
    same = (
        *("num_entries", "dim", "num_valid", "unwrap_int16", "metric", "key_layer"),
        *("model_id", "vocab_size", "corpus", "resume"),
    )
    with Progress(None, "import", "rows") as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.done)

        store = Datastore.import_legacy(
            args.source,
            args.datastore,
            **dtypes,
            **{name: getattr(args, name) for name in same},
            progress=advance,
        )
    say(store.describe())
    facts = facts_of(store)
    if args.faiss_index is not None:
        found = _adopt(args, store, args.faiss_index, say)
        facts["index"] = {"path": str(found.path), "adopted": found.sidecar.adopted}
    return facts


def info(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.datastore import Datastore
    from knnext.datastore.describe import lacking
    from knnext.datastore.meta_file import is_partial, not_joined
    from knnext.hub import open_partial
    from knnext.progress import Progress

    partial = is_partial(Path(args.datastore))
    if partial:
        store = open_partial(args.datastore)
    else:
        store = Datastore.open(args.datastore, allow_unfinished=True)
    if args.verify and partial:
        raise ValueError(
            f"--verify reads a whole datastore, and {args.datastore} holds some of its files, each "
            "of which was compared when it was fetched"
        )
    if args.verify and store.unfinished and store.meta.parts:
        lacks = not_joined(store.path, store.meta)
        raise ValueError(f"--verify reads what is joined, or the folder of one part; {lacks}")
    say(store.describe())
    say(f"fingerprint {store.fingerprint}")
    facts = facts_of(store) | _beside(args.datastore)
    for name in ("index", "tuning"):
        if name in facts:
            say(f"{name:<12}{facts[name]['path']}")
    facts["lacking"] = lacking(store.path, store.meta) if partial else []
    if "keys" in facts["lacking"]:
        return facts
    codes, facts["search"] = _search_way(store, say)
    if codes is not None:
        facts["codes"] = _code_facts(codes)
    if args.verify:
        with Progress(None, "verify", "bytes") as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.done)

            store.verify(advance)
        if codes is not None:
            codes.verify()
        facts["verified"] = True
        say("verified    every checksum agrees")
    return facts


def facts_of(store: Datastore) -> dict[str, Any]:
    from knnext.datastore.meta_file import to_json

    facts: dict[str, Any] = json.loads(to_json(store.meta))
    return {
        "path": str(store.path),
        "fingerprint": store.fingerprint,
        "unfinished": store.unfinished,
        "rows": store.num_entries,  # without what is deleted
        "text": None,  # of datastores from before they were kept
        "model": None,
        **facts,
    }


def _beside(datastore: str) -> dict[str, Any]:
    """The index and the tuning that lie beside a datastore, where there are some."""
    from knnext.evaluation.tuning_file import tuning_path

    found: dict[str, Any] = {}
    folder = Path(datastore).resolve()
    sidecar = folder.with_name(folder.name + ".index") / "index.json"
    for name, path in (("index", sidecar), ("tuning", tuning_path(datastore))):
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(
                    f"{path} is not what `knnext {name.replace('tuning', 'tune')}` writes"
                )
            content.pop("nll", None)  # the surface
            found[name] = {"path": str(path), **content}
    return found


def _search_way(store: Datastore, say: Say) -> tuple[StoredCodes | None, str]:
    """The codes that an exact search uses, and a line on what it goes through."""
    import torch

    from knnext.index import StoredCodes
    from knnext.index.exact import describe_exact

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codes, line = describe_exact(store, device)
    say(f"{'search':<12}{line}")
    return codes if isinstance(codes, StoredCodes) else None, line


def _say_facts(facts: dict[str, Any], say: Say) -> None:
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        say(f"{name:<{width}}{f'{value:,}' if isinstance(value, int) else value}")
