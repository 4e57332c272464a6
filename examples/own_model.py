"""From a folder of texts and a causal LM to a mixture that is tuned, scored and generates.

    python examples/own_model.py MODEL TEXTS STORE ["A prompt"]

MODEL: a folder or hub name; TEXTS: a folder of text files; STORE: where the datastore goes. Run
again, it goes on where it stopped, and opens what is there.
"""

from __future__ import annotations

import argparse

from knnext import (
    KNNLM,
    ExactIndex,
    build_datastore,
    evaluate,
    load_corpus,
    search_stream,
    tokenize,
    tune,
)
from knnext.index import StoredCodes
from knnext.lm.load import load_lm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("store")
    parser.add_argument("prompt", nargs="?", default="The")
    parser.add_argument("--k", type=int, default=1024)
    given = parser.parse_args()

    model, tokenizer = load_lm(given.model)
    corpus = load_corpus(given.texts)
    train = tokenize(corpus.train, tokenizer)
    store = build_datastore(model, tokenizer, train, given.store, corpus=corpus.facts("train"))
    StoredCodes.renew(store)  # eight bits a number: the same answers, faster
    index = ExactIndex(store)

    valid = search_stream(model, index, tokenize(corpus.valid, tokenizer), k=given.k)
    best = tune(valid)
    test = search_stream(model, index, tokenize(corpus.test, tokenizer), k=given.k)
    found = evaluate(test, best.temperature, best.lmbda)
    print(f"temperature {best.temperature:.3g}, lmbda {best.lmbda:.3g}, fitted on valid")
    print(f"test perplexity per token: {found.base.token:.2f} -> {found.mixture.token:.2f}")

    lm = KNNLM(model, index, k=given.k, temperature=best.temperature, lmbda=best.lmbda)
    inputs = tokenizer(given.prompt, return_tensors="pt")
    print(tokenizer.decode(lm.generate(**inputs, max_new_tokens=40, do_sample=False)[0]))


if __name__ == "__main__":
    main()
