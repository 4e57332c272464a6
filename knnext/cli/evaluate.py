"""The commands that score a text: tune, eval."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.cli.session import (
    Settings,
    check_model,
    is_first,
    open_datastore,
    open_index,
    open_model,
    ranks_of,
)
from knnext.cli.text import text_to_score
from knnext.output import check_outputs
from knnext.say import Say

if TYPE_CHECKING:
    from knnext.corpus import TokenizedDocuments
    from knnext.datastore import Datastore
    from knnext.evaluation import Evaluation
    from knnext.evaluation.scores import StreamScores


def tune(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.evaluation import tune as tuning
    from knnext.evaluation.tuning_file import (
        SEARCH,
        edge_notes,
        picture_path,
        tuning_path,
        write_tuning,
    )

    # A new fit must not lean on an old one.
    settings = Settings.of(args, tuned=False)
    path = Path(args.out) if args.out else tuning_path(args.datastore)
    scores = _scores(args, settings, say, path, picture_path(path))
    if not is_first(args):
        return {}
    grid = {"temperatures": args.temperatures, "lmbdas": args.lmbdas}
    found = tuning.tune(scores, **{name: values for name, values in grid.items() if values})
    search = {**asdict(settings), "k": scores.k}
    replaced = write_tuning(path, found, {name: search[name] for name in SEARCH})
    result = {**search, **found.to_dict()}
    say(f"temperature {found.temperature:.4g}, lmbda {found.lmbda:.4g}")
    say(f"perplexity  {found.perplexity:.2f}, of the base model alone {found.base_perplexity:.2f}")
    say(f"written     {path}")
    if replaced is not None:
        say(f"replaced    the fit kept in {replaced.path} ({replaced.words})")
        if replaced.better:
            say("note: the fit that was replaced had a lower perplexity on the same text")
    for line in edge_notes(found):
        say(line)
    picture = _picture(found, picture_path(path), say)
    for name in ("nll", "temperatures", "lmbdas"):  # the file has the surface
        del result[name]
    before = None if replaced is None else str(replaced.path)
    return {**result, "path": str(path), "picture": picture, "replaced": before}


def _picture(found: Any, path: Path, say: Say) -> str | None:
    from knnext.report.plots import plot_surface

    if min(found.surface.shape) < 2:
        return None
    try:
        plot_surface(found, path)
    except ImportError as error:  # the numbers are worth having without it
        say(f"no picture: {error}")
        return None
    say(f"picture     {path}")
    return str(path)


def evaluate(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.evaluation import check_token_log, evaluate, write_token_log
    from knnext.report.rows import table_rows
    from knnext.report.table import text_table

    if not args.scores:
        open_datastore(args)  # a missing one is not a missing temperature
    settings = Settings.of(args)
    temperature, lmbda = settings.mixture()
    if args.token_log and is_first(args):
        check_token_log(args.token_log)
    scores = _scores(args, settings, say, args.token_log)
    if not is_first(args):
        return {}
    evaluation = evaluate(scores, temperature, lmbda)
    name = f"kNN-LM, {settings.index}" + (", real score" if settings.rescore else "")
    say(text_table(table_rows({name: evaluation}, {})))
    for line in _detail_lines(evaluation):
        say(line)
    if args.token_log:
        say(f"token log   {write_token_log(scores, args.token_log, temperature, lmbda)}")
    return {**asdict(settings), **evaluation.to_dict()}


def _detail_lines(evaluation: Evaluation) -> list[str]:
    lines = [
        "",
        f"{evaluation.num_tokens:,} tokens of {evaluation.num_documents:,} documents, "
        f"k {evaluation.k:,}; target found {100 * evaluation.target_found:.1f} %, "
        f"helped {100 * evaluation.helped:.1f} %",
        *_infinite(evaluation),
        f"{'':10}{'token':>12}{'word':>12}{'bits/byte':>12}",
    ]
    for name in ("base", "knn", "mixture", "oracle"):
        one = getattr(evaluation, name)
        cells = (one.token, one.word, one.bits_per_byte)
        shown = ("unknown" if x is None else f"{x:,.4g}" for x in cells)
        lines.append(f"{name:10}" + "".join(f"{text:>12}" for text in shown))
    return lines


def _infinite(evaluation: Evaluation) -> list[str]:
    """Why the neighbors alone are "inf", where they are."""
    missing = round((1 - evaluation.target_found) * evaluation.num_tokens)
    if math.isfinite(evaluation.knn.nll) or not missing:
        return []
    return [
        f"knn alone is inf: no neighbor stands for {missing:,} of the targets, which have "
        "probability 0 there"
    ]


def _scores(
    args: argparse.Namespace, settings: Settings, say: Say, *outputs: str | Path | None
) -> StreamScores:
    """From the file, or from one pass of the model and the search; `outputs` are tried before."""
    from knnext.datastore.build import bos_of
    from knnext.evaluation import StreamScores, search_stream
    from knnext.evaluation.pieces import settled

    if is_first(args):
        check_outputs(args.save_scores, *outputs, reads=(args.scores,))
    if args.scores:
        scores = StreamScores.load(args.scores)
        _check_kept(args, scores)
        return scores.truncate(args.k) if args.k else scores
    store = open_datastore(args)
    model, tokenizer = open_model(args, store)
    check_model(store, model, tokenizer)
    text, _ = text_to_score(args, tokenizer, store, say)
    say(f"{args.split}: {len(text) - 1:,} tokens of {text.num_documents:,} documents")
    ranks = ranks_of(args)
    grid = settled(model, args.block_size, args.stride, args.batch_size, ranks)
    apart = _apart(args, store, say)
    say(_windows(text, grid, apart, args.full_last_window))
    scores = search_stream(
        model,
        open_index(args, store, settings, say),
        text,
        k=settings.k,
        **grid,
        separate_documents=apart,
        full_last_window=args.full_last_window,
        keep_indices=bool(args.save_scores),
        bos="as built" if args.bos_each_window is None else bos_of(tokenizer, args.bos_each_window),
        allow_overlap=args.allow_overlap,
        ranks=ranks,
    )
    if args.save_scores and is_first(args):
        scores.save(args.save_scores)
    return scores


def _check_kept(args: argparse.Namespace, scores: StreamScores) -> None:
    """ValueError for options that what was kept can no longer follow."""
    words = getattr(args, "words", None)
    if words is not None and words != scores.words:
        raise ValueError(
            f"--words {words}: the words of {args.scores} were counted as {scores.words!r}; score "
            "the text again, without --scores"
        )
    given = {
        "--separate-documents": args.separate_documents,
        "--full-last-window": args.full_last_window or None,
    }
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"{option}: {args.scores} keeps how it was read; leave the option out")


def _apart(args: argparse.Namespace, store: Datastore, say: Say) -> bool:
    """Whether documents are read one by one: as the datastore was built, unless somebody says."""
    built = bool((store.meta.origin or {}).get("separate_documents"))
    given = built if args.separate_documents is None else bool(args.separate_documents)
    if given != built:
        ways = {True: "each document alone", False: "documents as one stream"}
        say(
            f"note: the datastore was built from {ways[built]}, and this reads {ways[given]}: "
            "queries at the head of a document differ from the keys there"
        )
    return given


def _windows(text: TokenizedDocuments, grid: dict[str, int], apart: bool, full_last: bool) -> str:
    from knnext.lm.windows import Windows

    offsets = text.document_offsets if apart else None
    sizes = (grid["block_size"], grid["stride"])
    return Windows.over(len(text), *sizes, offsets, full_last=full_last).describe()
