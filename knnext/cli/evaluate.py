"""The commands that score a text: tune, eval."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.cli.session import (
    Settings,
    check_model,
    open_datastore,
    open_index,
    open_model,
    tuning_path,
)
from knnext.cli.text import text_to_score
from knnext.output import check_writable, write_json
from knnext.say import Say

if TYPE_CHECKING:
    from knnext.evaluation import Evaluation
    from knnext.evaluation.scores import StreamScores


def tune(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.evaluation import tune as tuning

    # A new fit must not lean on an old one.
    settings = Settings.of(args, tuned=False)
    path = Path(args.out) if args.out else tuning_path(args.datastore)
    scores = _scores(args, settings, say, path)
    grid = {"temperatures": args.temperatures, "lmbdas": args.lmbdas}
    found = tuning.tune(scores, **{name: values for name, values in grid.items() if values})
    result = {**asdict(settings), **found.to_dict(), "k": scores.k}
    write_json(path, result)
    say(f"temperature {found.temperature:.4g}, lmbda {found.lmbda:.4g}")
    say(f"perplexity  {found.perplexity:.2f}, of the base model alone {found.base_perplexity:.2f}")
    say(f"written     {path}")
    for edge in found.edges:
        say(f"note: the best point lies at the {edge} of the grid; a wider one may be better")
    picture = _picture(found, path.with_suffix(".png"), say)
    for name in ("nll", "temperatures", "lmbdas"):  # the file has the surface
        del result[name]
    return {**result, "path": str(path), "picture": picture}


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
    from knnext.evaluation import evaluate, write_token_log
    from knnext.report.rows import table_rows
    from knnext.report.table import text_table

    if not args.scores:
        open_datastore(args)  # a missing one is not a missing temperature
    settings = Settings.of(args)
    temperature, lmbda = settings.mixture()
    scores = _scores(args, settings, say, args.token_log)
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
        f"{'':10}{'token':>12}{'word':>12}{'bits/byte':>12}",
    ]
    for name in ("base", "knn", "mixture", "oracle"):
        one = getattr(evaluation, name)
        cells = (one.token, one.word, one.bits_per_byte)
        shown = ("unknown" if x is None else f"{x:,.4g}" for x in cells)
        lines.append(f"{name:10}" + "".join(f"{text:>12}" for text in shown))
    return lines


def _scores(
    args: argparse.Namespace, settings: Settings, say: Say, *outputs: str | Path | None
) -> StreamScores:
    """From the file, or from one pass of the model and the search; `outputs` are tried before."""
    from knnext.datastore.build import bos_of
    from knnext.evaluation import StreamScores, search_stream

    for path in (args.save_scores, *outputs):
        if path:
            check_writable(path)
    if args.scores:
        scores = StreamScores.load(args.scores)
        return scores.truncate(args.k) if args.k else scores
    store = open_datastore(args)
    model, tokenizer = open_model(args)
    check_model(store, model, tokenizer)
    text, _ = text_to_score(args, tokenizer, store, say)
    say(f"{args.split}: {len(text) - 1:,} tokens of {text.num_documents:,} documents")
    scores = search_stream(
        model,
        open_index(args, store, settings),
        text,
        k=settings.k,
        block_size=args.block_size,
        stride=args.stride,
        batch_size=args.batch_size,
        bos="as built" if args.bos_each_window is None else bos_of(tokenizer, args.bos_each_window),
        allow_overlap=args.allow_overlap,
    )
    if args.save_scores:
        scores.save(args.save_scores)
    return scores
