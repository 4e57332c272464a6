// The table of contents: every op of knnext, in the order data flows through them.
// design: each `.tensor` overload stands before its float twin, because torch's overload packet
// tries them in order of definition and would otherwise turn a 0-dim tensor into a float and lose
// its gradient without a word. Names that begin with `_` are for knnext/ops alone.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(knnext, m) {
  // Search
  m.def(
      "knn_search(Tensor queries, Tensor keys, int k, str metric=\"l2\", *, "
      "Tensor? key_sqnorms=None, int index_offset=0, Tensor? init_distances=None, "
      "Tensor? init_indices=None, bool refine=False) -> (Tensor distances, Tensor indices)");
  m.def("key_sqnorms(Tensor keys) -> Tensor");
  m.def("rescore(Tensor queries, Tensor keys, Tensor indices, str metric=\"l2\") -> Tensor");
  m.def("merge_topk(Tensor distances, Tensor indices, int k) -> (Tensor, Tensor)");

  // Search by eight-bit codes
  m.def("encode_keys(Tensor keys, Tensor center) -> (Tensor codes, Tensor code_stats)");
  m.def(
      "knn_search_codes(Tensor queries, Tensor keys, Tensor codes, Tensor code_stats, "
      "Tensor center, int k, str metric=\"l2\", *, Tensor? key_sqnorms=None, "
      "int index_offset=0, Tensor? init_distances=None, Tensor? init_indices=None, "
      "bool refine=False) -> (Tensor distances, Tensor indices)");

  // Mixing
  m.def(
      "knn_softmax.tensor(Tensor distances, Tensor tokens, Tensor temperature, "
      "int vocab_size) -> Tensor");
  m.def(
      "knn_softmax(Tensor distances, Tensor tokens, float temperature, int vocab_size) "
      "-> Tensor");
  m.def(
      "knn_interpolate.tensor(Tensor lm_logits, Tensor distances, Tensor tokens, "
      "Tensor temperature, Tensor lmbda) -> Tensor");
  m.def(
      "knn_interpolate(Tensor lm_logits, Tensor distances, Tensor tokens, float temperature, "
      "float lmbda) -> Tensor");
  m.def(
      "knn_target_log_prob.tensor(Tensor distances, Tensor tokens, Tensor targets, "
      "Tensor temperature) -> Tensor");
  m.def(
      "knn_target_log_prob(Tensor distances, Tensor tokens, Tensor targets, "
      "float temperature) -> Tensor");

  // Gradients. Those of temperature and lmbda come by row, (Q,); what is not needed comes empty.
  m.def(
      "_knn_softmax_gradients.tensor(Tensor grad, Tensor distances, Tensor tokens, "
      "Tensor temperature) -> (Tensor grad_distances, Tensor grad_temperature)");
  m.def(
      "_knn_softmax_gradients(Tensor grad, Tensor distances, Tensor tokens, float temperature) "
      "-> (Tensor grad_distances, Tensor grad_temperature)");
  m.def(
      "_knn_interpolate_gradients.tensor(Tensor grad, Tensor lm_logits, Tensor distances, "
      "Tensor tokens, Tensor output, Tensor temperature, Tensor lmbda, bool need_logits, "
      "bool need_lmbda) -> (Tensor grad_logits, Tensor grad_distances, Tensor grad_temperature, "
      "Tensor grad_lmbda)");
  m.def(
      "_knn_interpolate_gradients(Tensor grad, Tensor lm_logits, Tensor distances, "
      "Tensor tokens, Tensor output, float temperature, float lmbda, bool need_logits, "
      "bool need_lmbda) -> (Tensor grad_logits, Tensor grad_distances, Tensor grad_temperature, "
      "Tensor grad_lmbda)");
  m.def(
      "_knn_target_log_prob_gradients.tensor(Tensor grad, Tensor distances, Tensor tokens, "
      "Tensor targets, Tensor output, Tensor temperature) "
      "-> (Tensor grad_distances, Tensor grad_temperature)");
  m.def(
      "_knn_target_log_prob_gradients(Tensor grad, Tensor distances, Tensor tokens, "
      "Tensor targets, Tensor output, float temperature) "
      "-> (Tensor grad_distances, Tensor grad_temperature)");
  m.def(
      "_rescore_gradients(Tensor grad, Tensor queries, Tensor keys, Tensor indices, "
      "Tensor? order, str metric, bool need_queries) -> (Tensor grad_queries, Tensor grad_keys)");
}
