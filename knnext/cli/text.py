"""The text that a command reads: a split of a corpus, or what the user types or pipes in."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.say import Say

if TYPE_CHECKING:
    from knnext.corpus import Corpus, SplitFacts, TokenizedDocuments
    from knnext.datastore import Datastore

#: Options of the command line, and what `SplitFacts` calls them.
_OPTIONS = {
    "split_seed": "seed",
    "shares": "shares",
    "text_column": "text_column",
    "text_errors": "errors",
}
_DIVIDING = ("split_seed", "shares")


def text_to_store(
    args: argparse.Namespace, tokenizer: Any
) -> tuple[TokenizedDocuments, SplitFacts]:
    """The split that `build` is to store, and what the datastore keeps of it."""
    from knnext.corpus import load_corpus, tokenize

    given = {name: getattr(args, option) for option, name in _OPTIONS.items()}
    chosen = {name: value for name, value in given.items() if value is not None}
    corpus = load_corpus(args.corpus, max_bytes=args.max_bytes, **chosen)
    return tokenize(_documents(corpus, args.split), tokenizer), corpus.facts(args.split)


def text_to_score(
    args: argparse.Namespace, tokenizer: Any, store: Datastore, say: Say
) -> tuple[TokenizedDocuments, SplitFacts]:
    """The split that is to be scored, divided as it was for the datastore.

    Raises:
        ValueError: options that would divide the datastore's corpus otherwise, without
            `--allow-overlap`. Whether documents are in the datastore is `search_stream`'s to tell.
    """
    from knnext.corpus import load_corpus, tokenize

    kept = _kept(store)
    spec = args.corpus or (store.meta.corpus if kept is None else kept.corpus)
    if spec is None:
        raise ValueError("the datastore does not name its corpus: give --corpus")
    same = kept if kept is not None and _same(spec, kept) else None
    if same is not None and not args.allow_overlap:
        _check_division(args, same)
    elif kept is None and not args.corpus and not _is_absolute(spec):
        say(
            f"note: the datastore names its corpus as {spec!r}, and not from which folder; "
            f"read is {Path(spec).resolve()}"
        )
    corpus = load_corpus(spec, **_reading(args, kept, same))
    if same is not None:
        _note_changes(corpus, same, say)
    text = tokenize(
        _documents(corpus, args.split),
        tokenizer,
        max_tokens=args.document_tokens,
        words=getattr(args, "words", None) or "marks",
    )
    return text, corpus.facts(args.split)


def _kept(store: Datastore) -> SplitFacts | None:
    from knnext.corpus import SplitFacts

    try:
        kept = None if store.meta.text is None else SplitFacts.from_dict(store.meta.text)
    except KeyError:
        return None
    if kept is None:
        return None
    words = (kept.corpus, kept.split, kept.text_column, kept.errors)
    known = all(isinstance(word, str) for word in words) and isinstance(kept.seed, int)
    return kept if known and len(kept.shares) == 3 else None  # no build says anything else


def _same(spec: str, kept: SplitFacts) -> bool:
    from knnext.corpus import absolute_spec

    return absolute_spec(spec) == kept.corpus


def _is_absolute(spec: str) -> bool:
    return spec == "stdlib" or spec.startswith("hf:") or Path(spec).expanduser().is_absolute()


def _check_division(args: argparse.Namespace, kept: SplitFacts) -> None:
    for option in _DIVIDING:
        given, has = getattr(args, option), getattr(kept, _OPTIONS[option])
        if given is not None and given != has:
            raise ValueError(
                f"--{option.replace('_', '-')} is {_shown(given)}, but the datastore holds the "
                f"{kept.split} split of {_shown(has)}: another division would score documents "
                "that are in it. Leave the option out, or say --allow-overlap"
            )


def _shown(value: Any) -> str:
    return ",".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)


def _reading(
    args: argparse.Namespace, kept: SplitFacts | None, same: SplitFacts | None
) -> dict[str, Any]:
    """Arguments of `load_corpus`: as given, else as the datastore has them."""
    found: dict[str, Any] = {"max_bytes": None if same is None else same.max_bytes}
    for option, name in _OPTIONS.items():
        given = getattr(args, option)
        value = getattr(kept, name, None) if given is None else given
        if value is not None:
            found[name] = value
    return found


def _note_changes(corpus: Corpus, kept: SplitFacts, say: Say) -> None:
    alike = (corpus.seed, corpus.shares) == (kept.seed, kept.shares)
    if kept.documents is None or not alike:
        return
    if corpus.facts(kept.split).documents != kept.documents:
        say(
            f"note: {kept.corpus} has changed since the datastore was built: the documents of its "
            f"{kept.split} split are not the ones that are stored"
        )


def _documents(corpus: Corpus, split: str) -> Any:
    documents = corpus.split(split)
    if not documents:
        raise ValueError(
            f"corpus {corpus.name!r} has no {split} split with shares {_shown(corpus.shares)}; "
            "give another --corpus or --shares"
        )
    return documents


def text_of(given: str, errors: str = "strict") -> str:
    """The text of an argument, or of stdin for ``-``.

    CorpusError names the line of a byte that is no UTF-8; with ``errors="replace"`` it becomes
    U+FFFD.
    """
    from knnext.corpus.decode import check_text, decode

    if given != "-":
        return check_text(given, "the text on the command line", errors)
    if sys.stdin is None:
        raise ValueError("stdin is closed; the text '-' is read from it")
    raw = getattr(sys.stdin, "buffer", None)
    text = sys.stdin.read() if raw is None else decode(raw.read(), "stdin", errors)
    return check_text(text, "stdin", errors)
