# %% [markdown]
# # The ops in a loop of your own
#
# No datastore on disk, no model of ours: three ops between your model's states and your loss.
#
# ```
# python docs/tutorials/eval_loop.py
# ```

# %%
import torch

import knnext

torch.manual_seed(0)
vocab_size, dim, k = 500, 32, 16

# %% [markdown]
# ## Keys and values
#
# A key is what your model's layer gave in front of a token; the token is the value. Here every
# token has a state of its own with some noise, and is followed by one of three others, as in a
# text with habits.

# %%
table = torch.randn(vocab_size, dim)
follows = torch.randint(vocab_size, (vocab_size, 3))


def text(length: int) -> torch.Tensor:
    tokens = [0]
    for choice in torch.randint(3, (length - 1,)).tolist():
        tokens.append(int(follows[tokens[-1], choice]))
    return torch.tensor(tokens)


def states(tokens: torch.Tensor) -> torch.Tensor:
    return (table[tokens] + 0.5 * torch.randn(len(tokens), dim)).half()


train, test = text(8000), text(1000)
keys, values = states(train[:-1]), train[1:]

# %% [markdown]
# ## Search, mix, score
#
# `knn_search` is exact and never holds the matrix of all distances; smaller distances are nearer.
# `gather_tokens` gives their tokens, -1 where there is no neighbor. `knn_interpolate` mixes in
# log space. All three work on CPU and CUDA tensors, and under `torch.compile(fullgraph=True)`.

# %%
queries, targets = states(test[:-1]), test[1:]
lm_logits = torch.zeros(len(targets), vocab_size)  # a model that knows nothing
sqnorms = knnext.key_sqnorms(keys)  # once, and not at every search
distances, indices = knnext.knn_search(queries, keys, k, key_sqnorms=sqnorms)
tokens = knnext.gather_tokens(values, indices)
log_p = knnext.knn_interpolate(lm_logits, distances, tokens, temperature=10.0, lmbda=0.5)
nll = -log_p.gather(1, targets[:, None]).mean()
print(f"perplexity {vocab_size} -> {float(nll.exp()):.1f}")

# %% [markdown]
# ## Only the target's probability
#
# Where perplexity is all that is wanted, `knn_target_log_prob` never makes the row over the
# vocabulary: it is the same number, for much less.

# %%
log_p_knn = knnext.knn_target_log_prob(distances, tokens, targets, temperature=10.0)
log_p_lm = lm_logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
half = torch.log(torch.tensor(0.5))
again = -torch.logaddexp(half + log_p_lm, half + log_p_knn).mean()
print(f"the same: {bool(torch.isclose(nll, again, rtol=1e-5))}")

# %% [markdown]
# ## Leave a row out
#
# A text that is in the datastore finds itself. `ExactIndex.from_tensors` takes documents, and
# leaves those of a query out inside of the search: the answer is as if they were not there.

# %%
documents = torch.arange(len(keys)) // 100
index = knnext.ExactIndex.from_tensors(keys, values, documents=documents)
own = documents[:5]
_, with_itself = index.search(keys[:5], 1)
_, without = index.search(keys[:5], 1, exclude_documents=own)
print(f"finds itself: {with_itself[:, 0].tolist()}; without its document: {without[:, 0].tolist()}")
