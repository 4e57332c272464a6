// Argument checks shared by the CPU and the CUDA kernels. Each message names the op, the argument,
// what is wanted and what was given; knnext/ops/_checks.py says the same for fake tensors.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "complaints.h"
#include "metric.h"

namespace knnext {

struct SearchShape {
  int64_t num_queries, num_keys, dim, k, num_init;
  Metric metric;
};

struct MixShape {
  int64_t num_queries, k, vocab_size;
  bool wide;  // float64 distances: computed and returned in float64
};

Metric parse_metric(const char* op, const std::string& metric);

SearchShape check_knn_search(const Tensor& queries, const Tensor& keys, int64_t k,
                             const std::string& metric, const std::optional<Tensor>& key_sqnorms,
                             int64_t index_offset, const std::optional<Tensor>& init_distances,
                             const std::optional<Tensor>& init_indices,
                             const char* op = "knn_search");
// The same, and codes of the keys; `keys` may lie on the CPU while all else is on CUDA.
SearchShape check_knn_search_codes(const Tensor& queries, const Tensor& keys, const Tensor& codes,
                                   const Tensor& code_stats, const Tensor& center, int64_t k,
                                   const std::string& metric,
                                   const std::optional<Tensor>& key_sqnorms, int64_t index_offset,
                                   const std::optional<Tensor>& init_distances,
                                   const std::optional<Tensor>& init_indices);
void check_encode_keys(const Tensor& keys, const Tensor& center);
void check_key_sqnorms(const Tensor& keys);
Metric check_rescore(const Tensor& queries, const Tensor& keys, const Tensor& indices,
                     const std::string& metric);
void check_merge_topk(const Tensor& distances, const Tensor& indices, int64_t k);

// distances and tokens of the mixing ops; vocab_size is left for the caller to fill in.
MixShape check_neighbors(const char* op, const Tensor& distances, const Tensor& tokens);
void check_vocab_size(const char* op, int64_t vocab_size);
void check_lm_logits(const char* op, const Tensor& lm_logits, const Tensor& distances);
void check_targets(const char* op, const Tensor& targets, const Tensor& distances);
// A number, or a float tensor () or (Q,) on the device of distances, whose values are checked where
// they are read.
void check_temperature(const char* op, double temperature, const Tensor& distances);
void check_temperature(const char* op, const Tensor& temperature, const Tensor& distances);
void check_lmbda(const char* op, double lmbda, const Tensor& distances);
void check_lmbda(const char* op, const Tensor& lmbda, const Tensor& distances);
// A gradient or an output that comes back: of the dtype, device and first size of distances.
void check_output_rows(const char* op, const char* name, const Tensor& rows,
                       const Tensor& distances);
void check_output(const char* op, const char* name, const Tensor& output, const Tensor& distances,
                  int64_t vocab_size);
void check_order(const Tensor& order, const Tensor& indices);
void check_rescore_grad(const Tensor& grad, const Tensor& queries, const Tensor& indices);

}  // namespace knnext
