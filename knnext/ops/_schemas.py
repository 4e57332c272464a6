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
    "encode_keys(Tensor keys, Tensor center) -> (Tensor codes, Tensor code_stats)",
    "knn_search_codes(Tensor queries, Tensor keys, Tensor codes, Tensor code_stats, "
    'Tensor center, int k, str metric="l2", *, Tensor? key_sqnorms=None, int index_offset=0, '
    "Tensor? init_distances=None, Tensor? init_indices=None, bool refine=False) "
    "-> (Tensor distances, Tensor indices)",
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
# For knnext/ops alone.
GRADIENT_SCHEMAS = (
    "_knn_softmax_gradients.tensor(Tensor grad, Tensor distances, Tensor tokens, "
    "Tensor temperature) -> (Tensor grad_distances, Tensor grad_temperature)",
    "_knn_softmax_gradients(Tensor grad, Tensor distances, Tensor tokens, float temperature) "
    "-> (Tensor grad_distances, Tensor grad_temperature)",
    "_knn_interpolate_gradients.tensor(Tensor grad, Tensor lm_logits, Tensor distances, "
    "Tensor tokens, Tensor output, Tensor temperature, Tensor lmbda, bool need_logits, "
    "bool need_lmbda) -> (Tensor grad_logits, Tensor grad_distances, Tensor grad_temperature, "
    "Tensor grad_lmbda)",
    "_knn_interpolate_gradients(Tensor grad, Tensor lm_logits, Tensor distances, Tensor tokens, "
    "Tensor output, float temperature, float lmbda, bool need_logits, bool need_lmbda) "
    "-> (Tensor grad_logits, Tensor grad_distances, Tensor grad_temperature, Tensor grad_lmbda)",
    "_knn_target_log_prob_gradients.tensor(Tensor grad, Tensor distances, Tensor tokens, "
    "Tensor targets, Tensor output, Tensor temperature) "
    "-> (Tensor grad_distances, Tensor grad_temperature)",
    "_knn_target_log_prob_gradients(Tensor grad, Tensor distances, Tensor tokens, "
    "Tensor targets, Tensor output, float temperature) "
    "-> (Tensor grad_distances, Tensor grad_temperature)",
    "_rescore_gradients(Tensor grad, Tensor queries, Tensor keys, Tensor indices, Tensor? order, "
    "str metric, bool need_queries) -> (Tensor grad_queries, Tensor grad_keys)",
)
NAMES = tuple(schema.split("(")[0] for schema in SCHEMAS)
GRADIENT_NAMES = tuple(schema.split("(")[0] for schema in GRADIENT_SCHEMAS)
