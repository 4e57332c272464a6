"""The commands that read a text of the user's: search, generate."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from knnext.cli.session import Settings, check_model, open_datastore, open_index, open_model
from knnext.cli.text import text_of
from knnext.say import Say, shown


def search(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    import torch

    from knnext.evaluation.spans import neighbor_spans

    settings = Settings.of(args)
    store = open_datastore(args)
    model, tokenizer = open_model(args)
    check_model(store, model, tokenizer)
    index = open_index(args, store, settings)
    text = text_of(args.text, args.text_errors or "strict")
    query = _last_state(model, tokenizer, text, store.key_layer or "att", store.dtype)
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
        model(input_ids=torch.tensor([ids], dtype=torch.int64, device=model.device))
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
    text = text_of(args.text, args.text_errors or "strict")
    ids = torch.tensor([_ids(tokenizer, text)], dtype=torch.int64, device=model.device)
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


def _ids(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens, led by the mark that led every document of the datastore."""
    from knnext.corpus import separator_token

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [separator_token(tokenizer), *ids]
