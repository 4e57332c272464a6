# %% [markdown]
# # From a folder of your own to a model of your own
#
# Takes any folder of text files and any causal LM in a folder that transformers can open, builds
# the datastore, fits temperature and lmbda, scores and writes. As it stands it needs nothing: the
# texts are Python's own help topics, and the model is a small one, trained here within seconds.
# Put your folders in their place:
#
# ```
# python docs/tutorials/own_folder.py WORK [TEXTS MODEL]
# ```

# %%
import pydoc_data.topics
import sys
from pathlib import Path

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
from knnext.lm.load import load_lm, save_lm
from knnext.lm.train import TrainConfig, train_lm, train_tokenizer

work = Path(sys.argv[1] if len(sys.argv) > 1 else "tutorial")
work.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The texts
#
# Every file of a folder that is text is a document. Where the folder has no files called train,
# valid and test, a hash of each document's name divides it into 80, 10 and 10 parts of a hundred.

# %%
texts = Path(sys.argv[2]) if len(sys.argv) > 2 else work / "texts"
if len(sys.argv) <= 2:
    texts.mkdir(exist_ok=True)
    for name, text in sorted(pydoc_data.topics.topics.items()):
        (texts / f"{name.replace('/', '-')}.txt").write_text(text[:1500])
corpus = load_corpus(str(texts))
print(f"{len(corpus.train)} documents to store, {len(corpus.test)} to score")

# %% [markdown]
# ## The model
#
# `load_lm` opens a folder or a hub name. Without one, a GPT-2 of two layers learns the texts for
# some steps; that is enough to see what the neighbors add.

# %%
if len(sys.argv) > 3:
    model, tokenizer = load_lm(sys.argv[3])
else:
    words = train_tokenizer(corpus.train, vocab_size=512)
    config = TrainConfig(vocab_size=512, num_layers=2, dim=64, num_heads=2, batch_size=8)
    trained = train_lm(tokenize(corpus.train, words).tokens, words, config, max_steps=60)
    save_lm(work / "model", trained.model, words)
    model, tokenizer = load_lm(work / "model")

# %% [markdown]
# ## The datastore
#
# One pass of the model over the train split: the state in front of each token is its key, the
# token its value. What is there already is opened; what was interrupted goes on.

# %%
store = build_datastore(
    model,
    tokenizer,
    tokenize(corpus.train, tokenizer),
    work / "store",
    corpus=corpus.facts("train"),
)
print(store.describe())

# %% [markdown]
# ## Temperature and lmbda
#
# One search of the validation split is kept, and both numbers are fitted on it. The test split is
# searched once more, and tells what the mixture is worth. Nothing of valid or test is stored.

# %%
index = ExactIndex(store)
valid = search_stream(model, index, tokenize(corpus.valid, tokenizer), k=64)
best = tune(valid)
test = search_stream(model, index, tokenize(corpus.test, tokenizer), k=64)
found = evaluate(test, best.temperature, best.lmbda)
print(f"temperature {best.temperature:.3g}, lmbda {best.lmbda:.3g}")
print(f"perplexity per token: {found.base.token:.1f} -> {found.mixture.token:.1f}")

# %% [markdown]
# ## A model that looks things up
#
# `KNNLM` is a model of transformers whose probabilities are the mixture: `generate`, a pipeline
# and lm-evaluation-harness take it as it is.

# %%
lm = KNNLM(model, index, k=64, temperature=best.temperature, lmbda=best.lmbda)
inputs = tokenizer("The following", return_tensors="pt")
print(tokenizer.decode(lm.generate(**inputs, max_new_tokens=30, do_sample=False)[0]))
