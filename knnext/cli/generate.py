"""The commands that read a text of the user's: search, generate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from knnext.cli import streams
from knnext.cli.session import Settings, check_model, open_datastore, open_index, open_model
from knnext.cli.text import text_of
from knnext.evaluation.continuation import continued, plain_config
from knnext.evaluation.influence import Influence, influences
from knnext.evaluation.prompt import Prompt, pieces, read_prompt
from knnext.say import Say, shown

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.evaluation.spans import Span

_DEFAULT_NEW_TOKENS = 50
#: Documents with less of a token's p_knn than this are not worth a reader's time.
_NAMED = 0.01


def search(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    import torch

    from knnext.evaluation.spans import neighbor_spans
    from knnext.lm.hidden_states import default_block_size

    settings = Settings.of(args)
    store = open_datastore(args)
    model, tokenizer = open_model(args, store)
    check_model(store, model, tokenizer)
    index = open_index(args, store, settings)
    text = text_of(args.text, args.text_errors or "strict")
    prompt = read_prompt(text, tokenizer, store, default_block_size(model))
    query = _last_state(model, prompt.ids, store)
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
    for number, (neighbor, span) in enumerate(zip(neighbors, spans, strict=True), 1):
        for line in _neighbor_lines(number, neighbor, span):
            say(line)
    return {
        "k": args.k,
        "temperature": temperature,
        "tokens_given": prompt.given,
        "tokens_read": len(prompt.ids),
        "neighbors": neighbors,
    }


def _neighbor_lines(number: int, neighbor: dict[str, Any], span: Span) -> list[str]:
    before, after = map(shown, span.excerpt)
    text = f"{before}[{shown(span.token)}]{after}"
    facts = f"distance {neighbor['distance']:.4g}   share {100 * neighbor['share']:.3g} %"
    return [f"{number:>3}  {text}", f"     {facts}   {shown(neighbor['document'])}", ""]


def _last_state(model: Any, ids: list[int], store: Datastore) -> Any:
    """(1, D): the key-layer state after the last token."""
    import torch

    from knnext.lm.key_layer import capture_hidden_states
    from knnext.lm.running import evaluating

    with evaluating(model), capture_hidden_states(model, store.key_layer or "att") as captured:
        model(input_ids=torch.tensor([ids], dtype=torch.int64, device=model.device))
        return captured.states(1)[:, -1].to(store.dtype)


def generate(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.lm.knnlm import KNNLM

    settings = Settings.of(args)
    options = _decoding(args)
    store = open_datastore(args)
    temperature, lmbda = settings.mixture()
    model, tokenizer = open_model(args, store)
    check_model(store, model, tokenizer)
    index = open_index(args, store, settings)
    mixed = KNNLM(model, index, settings.k, temperature, lmbda)
    text = text_of(args.text, args.text_errors or "strict")
    prompt, options["max_new_tokens"] = _prompt(args, text, model, tokenizer, store)
    model.generation_config = plain_config(model, tokenizer)
    new = continued(mixed, prompt.ids, args.seed, **options)
    base = continued(model, prompt.ids, args.seed, **options)
    parts = pieces(tokenizer, prompt.ids + new, len(prompt.ids))
    base_text = "".join(pieces(tokenizer, prompt.ids + base, len(prompt.ids)))
    moved = influences(
        model,
        index,
        store,
        prompt.ids + new,
        len(prompt.ids),
        k=settings.k,
        temperature=temperature,
        lmbda=lmbda,
    )
    if args.text_only and not args.json and not sys.stdout.isatty():
        streams.write(sys.stdout, f"{text}{''.join(parts)}\n")  # whatever signs are in it
    else:
        say(text + "".join(parts))
    if not args.text_only:
        for line in _comparison("".join(parts), base_text, parts, moved):
            say(line)
    return {
        "text": text,
        "continuation": "".join(parts),
        "base_continuation": base_text,
        "temperature": temperature,
        "lmbda": lmbda,
        "tokens_given": prompt.given,
        "tokens_read": len(prompt.ids),
        "tokens": [
            {"token": part, "id": token, **asdict(one)}
            for part, token, one in zip(parts, new, moved, strict=True)
        ],
    }


def _decoding(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of transformers' generate: what was asked for, and nothing that was not."""
    sampling = {
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "temperature": args.sampling_temperature,
    }
    given = {name: value for name, value in sampling.items() if value is not None}
    options = {
        "num_beams": args.num_beams,
        "do_sample": args.do_sample,
        "repetition_penalty": args.repetition_penalty,
    }
    if args.do_sample:
        # Where nothing is said, transformers keeps the 50 likeliest tokens.
        return {**options, "top_k": 0, "top_p": 1.0, "temperature": 1.0, **given}
    if given:
        raise ValueError("--top-k, --top-p, --min-p and --sampling-temperature are for --do-sample")
    return options


def _prompt(
    args: argparse.Namespace, text: str, model: Any, tokenizer: Any, store: Datastore
) -> tuple[Prompt, int]:
    """The text's tokens, cut so that those asked for fit into the context after them; and those."""
    from knnext.lm.running import context_length

    limit, asked = context_length(model), args.max_new_tokens
    if limit is None:
        return read_prompt(text, tokenizer, store, None), asked or _DEFAULT_NEW_TOKENS
    asked = asked or max(1, min(_DEFAULT_NEW_TOKENS, limit // 2))
    if asked >= limit:
        given = read_prompt(text, tokenizer, store, None).given
        raise ValueError(
            f"{given} tokens given and {asked} asked for, and the model reads at most {limit}: "
            f"--max-new-tokens can be up to {limit - 1}, which leaves one token to go on from"
        )
    return read_prompt(text, tokenizer, store, limit - asked), asked


def _comparison(mixed: str, base: str, parts: list[str], moved: list[Influence]) -> Iterator[str]:
    yield ""
    yield "the base LM alone: " + ("the same" if mixed == base else shown(base))
    yield ""
    yield f"{'p':>8}{'p_lm':>9}{'p_knn':>9}  token, and the documents of its neighbors"
    for text, one in zip(parts, moved, strict=True):
        moving = [(name, part) for name, part in one.documents if part >= _NAMED * one.p_knn]
        documents = ", ".join(f"{shown(name)} {part:.2g}" for name, part in moving)
        numbers = f"{one.p:>8.2g}{one.p_lm:>9.2g}{one.p_knn:>9.2g}"
        yield f"{numbers}  [{shown(text)}]{'  ' + documents if documents else ''}"
