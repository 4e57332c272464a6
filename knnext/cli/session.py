"""What several commands open: models, datastores, indexes, and what `knnext tune` found."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.cli.delete import filter_of
from knnext.launch import launched, local_rank
from knnext.say import Say

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.index import FaissIndex, ShardedIndex
    from knnext.index.base import Index
    from knnext.ranks import Ranks

DEFAULT_K = 1024
_LOADING = (
    *("trust_remote_code", "model_dtype", "attn_implementation", "revision", "tokenizer", "gguf"),
    *("adapter", "merge_adapter", "device_map", "quantization", "compile"),
)
_MEMORY = ("query_batch", "chunk_bytes", "resident_bytes")
_TUNED = ("temperature", "lmbda", "k", "index", "nprobe", "rescore")


@dataclass(frozen=True)
class Settings:
    """How neighbors are searched and mixed: from the command line, else as tuned."""

    temperature: float | None
    lmbda: float | None
    k: int
    index: str
    nprobe: int | None
    rescore: bool

    @classmethod
    def of(cls, args: argparse.Namespace, *, tuned: bool = True) -> Settings:
        """An option that was given wins over the file that `tune` left beside the datastore."""
        from knnext.evaluation.tuning_file import tuning_path

        kept = _read_tuning(tuning_path(args.datastore)) if tuned else {}
        found: dict[str, Any] = {name: kept.get(name) for name in _TUNED}
        for name in _TUNED:
            given = getattr(args, name, None)
            found[name] = found[name] if given is None else given
        found["k"] = found["k"] or DEFAULT_K
        found["index"] = found["index"] or "exact"
        if found["index"] == "exact":
            if args.rescore or args.nprobe or getattr(args, "index_path", None):
                raise ValueError("--rescore, --nprobe and --index-path are for --index faiss")
            found["nprobe"] = None
        else:
            given = [name for name in _MEMORY if getattr(args, name, None) is not None]
            if given:
                option = given[0].replace("_", "-")
                raise ValueError(f"--{option} is for --index exact; this search goes by FAISS")
        found["rescore"] = bool(found["rescore"]) and found["index"] == "faiss"
        return cls(**found)

    def mixture(self) -> tuple[float, float]:
        """Temperature and lmbda, which have no default: they differ by orders between models."""
        if self.temperature is None or self.lmbda is None:
            raise ValueError(
                "no temperature and lmbda: run `knnext tune` on this datastore first, or give "
                "--temperature and --lmbda"
            )
        return self.temperature, self.lmbda


def _read_tuning(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in _TUNED}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not what `knnext tune` writes: {error}") from None


def device_of(args: argparse.Namespace) -> str:
    import torch

    from knnext.devices import checked_device

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.device in (None, "cuda") and found and launched()[1] > 1:
        return f"cuda:{local_rank() % found}"  # each rank of a machine its own
    if args.device is None:
        return "cuda" if found else "cpu"
    checked_device(args.device, "--device")
    return str(args.device)


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """What was said of how the model is loaded, as arguments of `load_lm`."""
    return {name: getattr(args, name) for name in _LOADING if getattr(args, name, None)}


def open_model(args: argparse.Namespace, store: Datastore | None = None) -> tuple[Any, Any]:
    """(model on its device, tokenizer); in the dtype that the datastore was built with, if any."""
    from knnext.lm.load import load_lm

    if args.model is None:
        raise ValueError("--model is missing; it may be left out with --scores only")
    device = device_of(args)  # before anything is read
    options = loading(args)
    if store is not None and options.get("model_dtype") == "auto":
        options["model_dtype"] = dtype_as_built(store)
    if "device_map" in options:
        if args.device is not None:
            raise ValueError("--device-map places the model itself: leave --device out")
        return load_lm(args.model, **options)
    return load_lm(args.model, device=device, **options)


def dtype_as_built(store: Datastore) -> str:
    """ "auto" where the datastore knows no model; the checkpoint's before dtypes were written."""
    from knnext.lm.model_dtype import MODEL_DTYPES

    meta = store.meta
    if meta.model is None:
        return "auto" if meta.model_revision is None else "checkpoint"
    found = meta.model.get("dtype", "auto")
    return found if found in MODEL_DTYPES else "auto"


def ranks_of(args: argparse.Namespace) -> Ranks | None:
    """The ranks that run this command together (knnext/cli/ranks.py), where there are several."""
    return getattr(args, "ranks", None)


def is_first(args: argparse.Namespace) -> bool:
    """Whether this process is the one that speaks and writes."""
    ranks = ranks_of(args)
    return ranks is None or ranks.rank == 0


def open_datastore(args: argparse.Namespace) -> Datastore:
    """The datastore; or what there is of its files, where the search that was asked for is content.

    FAISS without rescoring needs no keys: values and documents tell what it has found.
    """
    from knnext.datastore import Datastore
    from knnext.datastore.describe import lacking
    from knnext.datastore.meta_file import is_partial
    from knnext.hub import open_partial

    path = Path(args.datastore)
    if not is_partial(path):
        return Datastore.open(path)
    store = open_partial(path)
    settings = Settings.of(args) if hasattr(args, "rescore") else None
    by_faiss = settings is not None and settings.index == "faiss" and not settings.rescore
    lacks = lacking(path, store.meta)
    if lacks != ["keys"] or not by_faiss:
        raise ValueError(
            f"{path}: holds some files of a datastore, without {', '.join(lacks)}: `knnext pull` "
            "without --only fetches the rest into it. With values, documents and a FAISS index "
            "searches go by --index faiss without --rescore"
        )
    return store


def check_model(store: Datastore, model: Any, tokenizer: Any) -> None:
    """Refuse a datastore of another model or tokenizer; what an import left unsaid passes."""
    from knnext.lm.load import model_identity, model_parts, tokenizer_hash

    # The weights decide. The model_id beside them is a name for people, which a copy may change.
    _, revision = model_identity(model, store.meta.model_revision)
    store.check_compatible(
        model_revision=revision,
        model=model_parts(model),
        tokenizer_hash=tokenizer_hash(tokenizer, store.meta.tokenizer_hash),
    )


def open_index(
    args: argparse.Namespace, store: Datastore, settings: Settings, say: Say | None = None
) -> Index:
    """Says what an exact search goes through, where there is somebody to say it to."""
    from knnext.index import ShardedIndex
    from knnext.index.sharded_crew import open_exact

    leaves = filter_of(args)
    if settings.index == "exact":
        given = {name: getattr(args, name, None) for name in _MEMORY}
        limits: dict[str, Any] = {name: n for name, n in given.items() if n is not None}
        limits["device"] = device_of(args)
        ranks = ranks_of(args)
        exact = (
            open_exact(store, **limits) if ranks is None else ShardedIndex(store, ranks, **limits)
        )
        if say is not None:
            say(exact.describe())
        return exact if leaves is None else exact.restricted(leaves)
    approximate = _open_faiss(args, store, settings, say)
    return approximate if leaves is None else approximate.restricted(leaves)


def _open_faiss(
    args: argparse.Namespace, store: Datastore, settings: Settings, say: Say | None
) -> FaissIndex | ShardedIndex:
    """The FAISS index; of several ranks each holds its own rows of it, where it can be divided."""
    from knnext.index import FaissIndex, ShardedIndex
    from knnext.index.faiss import default_path
    from knnext.index.faiss_slice import undivided
    from knnext.index.sharded_crew import is_leading, open_faiss

    options: dict[str, Any] = {"nprobe": settings.nprobe, "rescore": settings.rescore}
    path, ranks = args.index_path or default_path(store), ranks_of(args)
    several = ranks is not None or is_leading()
    why = undivided(path, store) if several else ""
    if why and say is not None:
        say(f"note: {why}; each rank holds all of it, and searches its own share of the text by it")
    if why or not several:
        return FaissIndex.open(path, store, **options)
    divided: ShardedIndex
    if ranks is None:
        divided = open_faiss(store, path, **options)
    else:
        divided = ShardedIndex(store, ranks, faiss=path, **options)
    if say is not None:
        say(divided.describe())
    return divided
