// The table of contents: every op of knnext, in the order data flows through them.
// design: each `.tensor` overload stands before its float twin, because torch's overload packet
// tries them in order of definition and would otherwise turn a 0-dim tensor into a float and lose
// its gradient without a word.
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
}
