"""The ops alone, in an evaluation loop of your own: no datastore on disk, no model of ours.

    python examples/eval_loop.py

The "model" here is a table of random states, one a token, so that there is something to find:
states of the same token lie near each other. Put your own model's states and logits in their place.
"""

from __future__ import annotations

import torch

import knnext

VOCAB, DIM, K, TEMPERATURE, LMBDA = 1000, 64, 32, 20.0, 0.5


def states_of(tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(T, D) float16: what a model's last layer would give in front of each next token."""
    return (table[tokens] + 0.5 * torch.randn(len(tokens), DIM)).half()


def main() -> None:
    torch.manual_seed(0)
    table = torch.randn(VOCAB, DIM)
    # Every token is followed by one of three, as in a text with habits.
    follows = torch.randint(VOCAB, (VOCAB, 3))

    def text(length: int) -> torch.Tensor:
        tokens = torch.zeros(length, dtype=torch.int64)
        for i in range(1, length):
            tokens[i] = follows[tokens[i - 1], torch.randint(3, ())]
        return tokens

    train, test = text(20_000), text(2_000)
    keys, values = states_of(train[:-1], table), train[1:].int()
    sqnorms = knnext.key_sqnorms(keys)  # once, not at every search
    codes = knnext.encode_keys(keys)  # the same answers, faster

    log_p_base, log_p_mixed = 0.0, 0.0
    for tokens in test.split(256):
        queries, targets = states_of(tokens[:-1], table), tokens[1:]
        lm_logits = torch.zeros(len(targets), VOCAB)  # a model that knows nothing
        distances, indices = knnext.knn_search(queries, keys, K, key_sqnorms=sqnorms, codes=codes)
        neighbors = knnext.gather_tokens(values, indices)
        log_p = torch.ops.knnext.knn_interpolate(
            lm_logits, distances, neighbors, TEMPERATURE, LMBDA
        )
        log_p_mixed += float(log_p.gather(1, targets[:, None]).sum())
        log_p_base += float(lm_logits.log_softmax(1).gather(1, targets[:, None]).sum())
    count = sum(len(tokens) - 1 for tokens in test.split(256))
    for name, total in (("base", log_p_base), ("with neighbors", log_p_mixed)):
        print(f"{name}: perplexity {torch.tensor(-total / count).exp():.1f}")


if __name__ == "__main__":
    main()
