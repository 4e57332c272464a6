"""The schemas of csrc/library.cpp again, for a process without the compiled library.

A test holds the two lists to each other.
"""

from __future__ import annotations

SCHEMAS = (
    'knn_search(Tensor queries, Tensor keys, int k, str metric="l2", *, '
    "Tensor? key_sqnorms=None, int index_offset=0, Tensor? init_distances=None, "
    "Tensor? init_indices=None, bool refine=False) -> (Tensor distances, Tensor indices)",
    "key_sqnorms(Tensor keys) -> Tensor",
    'rescore(Tensor queries, Tensor keys, Tensor indices, str metric="l2") -> Tensor',
    "merge_topk(Tensor distances, Tensor indices, int k) -> (Tensor, Tensor)",
    "knn_softmax.tensor(Tensor distances, Tensor tokens, Tensor temperature, "
    "int vocab_size) -> Tensor",
    "knn_softmax(Tensor distances, Tensor tokens, float temperature, int vocab_size) -> Tensor",
    "knn_interpolate.tensor(Tensor lm_logits, Tensor distances, Tensor tokens, "
    "Tensor temperature, Tensor lmbda) -> Tensor",
    "knn_interpolate(Tensor lm_logits, Tensor distances, Tensor tokens, float temperature, "
    "float lmbda) -> Tensor",
    "knn_target_log_prob.tensor(Tensor distances, Tensor tokens, Tensor targets, "
    "Tensor temperature) -> Tensor",
    "knn_target_log_prob(Tensor distances, Tensor tokens, Tensor targets, "
    "float temperature) -> Tensor",
)
NAMES = tuple(schema.split("(")[0] for schema in SCHEMAS)
