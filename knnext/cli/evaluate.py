"""The commands that use a datastore: tune, eval, search, generate."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.cli.session import (
    Settings,
    check_model,
    open_datastore,
    open_index,
    open_model,
    read_text,
    tuning_path,
)
from knnext.output import write_json
from knnext.say import Say, shown

if TYPE_CHECKING:
    from knnext.evaluation import Evaluation
    from knnext.evaluation.scores import StreamScores


def tune(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.evaluation import tune as tuning

    # A new fit must not lean on an old one.
    settings = Settings.of(args, tuned=False)
    scores = _scores(args, settings, say)
    grid = {"temperatures": args.temperatures, "lmbdas": args.lmbdas}
    found = tuning.tune(scores, **{name: values for name, values in grid.items() if values})
    result = {**asdict(settings), **found.to_dict(), "k": scores.k}
    path = Path(args.out) if args.out else tuning_path(args.datastore)
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

    settings = Settings.of(args)
    temperature, lmbda = settings.mixture()
    scores = _scores(args, settings, say)
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


def _scores(args: argparse.Namespace, settings: Settings, say: Say) -> StreamScores:
    """From the file, or from one pass of the model and the search."""
    from knnext.evaluation import StreamScores, search_stream

    if args.scores:
        scores = StreamScores.load(args.scores)
        return scores.truncate(args.k) if args.k else scores
    store = open_datastore(args)
    model, tokenizer = open_model(args)
    check_model(store, model, tokenizer)
    text = read_text(args, tokenizer, store.meta.corpus)
    say(f"{args.split}: {len(text):,} tokens of {text.num_documents:,} documents")
    scores = search_stream(
        model,
        open_index(args, store, settings),
        text,
        k=settings.k,
        block_size=args.block_size,
        stride=args.stride,
        batch_size=args.batch_size,
    )
    if args.save_scores:
        scores.save(args.save_scores)
    return scores


def search(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    import torch

    from knnext.evaluation.spans import neighbor_spans

    settings = Settings.of(args)
    store = open_datastore(args)
    model, tokenizer = open_model(args)
    check_model(store, model, tokenizer)
    index = open_index(args, store, settings)
    query = _last_state(model, tokenizer, _text_of(args), store.key_layer or "att", store.dtype)
    distances, indices = index.search(query, args.k)
    temperature = settings.temperature or 1.0
    shares = torch.softmax(-distances[0] / temperature, 0)
    kept = indices[0] >= 0
    spans = neighbor_spans(
        store, tokenizer, indices[0][kept].cpu(), before=args.before, after=args.after
    )
    neighbors = [
        {"distance": distance, "share": share, **asdict(span)}
        for distance, share, span in zip(
            distances[0][kept].tolist(), shares[kept].tolist(), spans, strict=True
        )
    ]
    for number, neighbor in enumerate(neighbors, 1):
        for line in _neighbor_lines(number, neighbor):
            say(line)
    return {"k": args.k, "temperature": temperature, "neighbors": neighbors}


def _neighbor_lines(number: int, neighbor: dict[str, Any]) -> list[str]:

    text = f"{shown(neighbor['before'])}[{shown(neighbor['token'])}]{shown(neighbor['after'])}"
    facts = f"distance {neighbor['distance']:.4g}   share {100 * neighbor['share']:.2g} %"
    return [f"{number:>3}  {text}", f"     {facts}   {neighbor['document']}", ""]


def _last_state(model: Any, tokenizer: Any, text: str, key_layer: str, dtype: Any) -> Any:
    """(1, D): the key-layer state after the whole text, of which the last tokens may not fit."""
    import torch

    from knnext.lm.hidden_states import capture_hidden_states, default_block_size
    from knnext.lm.running import evaluating

    ids = _ids(tokenizer, text)[-default_block_size(model) :]
    with evaluating(model), capture_hidden_states(model, key_layer) as captured:
        model(input_ids=torch.tensor([ids], device=model.device))
        return captured.states(1)[:, -1].to(dtype)


def generate(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    import torch

    from knnext.lm.knnlm import KNNLM

    settings = Settings.of(args)
    temperature, lmbda = settings.mixture()
    store = open_datastore(args)
    model, tokenizer = open_model(args)
    check_model(store, model, tokenizer)
    index = open_index(args, store, settings)
    mixed = KNNLM(model, index, settings.k, temperature, lmbda)
    text = _text_of(args)
    ids = torch.tensor([_ids(tokenizer, text)], device=model.device)
    torch.manual_seed(args.seed)
    sampling = {"top_p": args.top_p} if args.do_sample else {}
    output = mixed.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        num_beams=args.num_beams,
        do_sample=args.do_sample,
        **sampling,
    )
    new = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    say(text + new)
    return {"text": text, "continuation": new, "temperature": temperature, "lmbda": lmbda}


def _text_of(args: argparse.Namespace) -> str:
    return sys.stdin.read() if args.text == "-" else str(args.text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens, led by the mark that led every document of the datastore."""
    from knnext.corpus import separator_token

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [separator_token(tokenizer), *ids]
