// What the CUDA launchers of the mixing, merging and rescoring ops take: plain structs, no torch.
// Pointers are device memory. A row begins `stride` elements after the one before it, and its
// elements are adjacent. The search's own structs are in cuda/search.h.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace knnext {

using Stream = CUstream_st*;  // cudaStream_t, for files that do not see CUDA's headers

constexpr int64_t kMaxNeighbors = 16384;  // of the CUDA ops: k, and the columns of distances

enum class Dtype : int { kHalf = 0, kBFloat16 = 1, kFloat = 2, kDouble = 3 };

// temperature or lmbda: one number, or a value a row (stride 0: one for all).
struct RowParameter {
  double number;
  const void* values;  // null: the number holds
  Dtype dtype;
  int64_t stride;
};

struct Neighbors {
  const float* distances;  // (rows, k)
  const void* tokens;      // (rows, k) int32 or int64
  int64_t distance_stride, token_stride;
  bool narrow_tokens;  // int32
  int64_t rows;
  int k;
  RowParameter temperature;
};

struct KnnSoftmaxParams {
  Neighbors neighbors;
  int64_t vocab_size;
  float* out;           // (rows, vocab_size)
  uint64_t* workspace;  // sort_workspace_words() words, or null where that is 0
};

struct KnnInterpolateParams {
  Neighbors neighbors;
  const void* logits;  // (rows, vocab_size)
  int64_t logits_stride;
  Dtype logits_dtype;
  RowParameter lmbda;
  int64_t vocab_size;
  float* out;
  uint64_t* workspace;
  uint64_t* split;  // split_words() words, or null where that is 0: a row is one block's
};

struct KnnTargetLogProbParams {
  Neighbors neighbors;
  const void* targets;  // (rows,) int32 or int64
  int64_t target_stride;
  bool narrow_targets;
  float* out;  // (rows,)
};

// Gradients come as (rows, k) and (rows,) of float32; `grad` is the one of the op's output.
struct NeighborGradients {
  float* distances;
  float* temperature;
};

struct KnnSoftmaxGradientsParams {
  Neighbors neighbors;
  const float* grad;  // (rows, vocab_size)
  int64_t grad_stride, vocab_size;
  NeighborGradients out;
};

struct KnnInterpolateGradientsParams {
  Neighbors neighbors;
  const void* logits;  // (rows, vocab_size)
  int64_t logits_stride;
  Dtype logits_dtype;
  RowParameter lmbda;
  int64_t vocab_size;
  const float *grad, *mixed;  // (rows, vocab_size); `mixed` is the op's output
  int64_t grad_stride, mixed_stride;
  NeighborGradients out;
  void* out_logits;     // (rows, vocab_size) of logits_dtype, or null: not wanted
  float* out_lmbda;     // (rows,), or null: not wanted
  uint64_t* workspace;  // token_set_words() words, or null where that is 0
};

struct KnnTargetLogProbGradientsParams {
  Neighbors neighbors;
  const void* targets;  // (rows,) int32 or int64
  int64_t target_stride;
  bool narrow_targets;
  const float *grad, *log_prob;  // (rows,); `log_prob` is the op's output
  int64_t grad_stride, log_prob_stride;
  NeighborGradients out;
};

struct MergeTopkParams {
  const float* distances;  // (rows, m)
  const int64_t* indices;
  int64_t distance_stride, index_stride;
  int64_t rows, m, k;
  float* out_distances;  // (rows, k)
  int64_t* out_indices;
  uint64_t* workspace;  // merge_workspace_words() words, or null where that is 0
};

struct KeySqnormsParams {
  const void* keys;  // (num_keys, dim)
  int64_t stride, num_keys, dim;
  Dtype dtype;
  float* out;
};

struct RescoreParams {
  const void *queries, *keys;
  int64_t query_stride, key_stride;
  int64_t num_queries, num_keys, dim, m;
  const int64_t* indices;  // (num_queries, m)
  int64_t index_stride;
  Dtype dtype;
  bool inner_product;
  float* out;  // (num_queries, m)
};

struct RescoreGradientsParams {
  const void *queries, *keys;
  int64_t query_stride, key_stride;
  int64_t num_queries, num_keys, dim, m;
  const int64_t* indices;  // (num_queries, m)
  int64_t index_stride;
  const float* grad;  // (num_queries, m)
  int64_t grad_stride;
  const int64_t* order;  // places of `indices`, flattened, in order of (index, place); or null
  Dtype dtype;
  bool inner_product;
  void* out_queries;  // (num_queries, dim), or null: not wanted
  void* out_keys;     // (num_keys, dim), zeros before; or null, as `order`
};

// Where a row's sort does not fit into the device's shared memory it runs in these.
int64_t sort_workspace_words(const Neighbors& neighbors, int64_t vocab_size);
int64_t split_words(const KnnInterpolateParams& params);
int64_t token_set_words(const KnnInterpolateGradientsParams& params);
int64_t merge_workspace_words(const MergeTopkParams& params);

void knn_softmax_launch(const KnnSoftmaxParams& params, Stream stream);
void knn_interpolate_launch(const KnnInterpolateParams& params, Stream stream);
void knn_target_log_prob_launch(const KnnTargetLogProbParams& params, Stream stream);
void knn_softmax_gradients_launch(const KnnSoftmaxGradientsParams& params, Stream stream);
void knn_interpolate_gradients_launch(const KnnInterpolateGradientsParams& params, Stream stream);
void knn_target_log_prob_gradients_launch(const KnnTargetLogProbGradientsParams& params,
                                          Stream stream);
void merge_topk_launch(const MergeTopkParams& params, Stream stream);
void key_sqnorms_launch(const KeySqnormsParams& params, Stream stream);
void rescore_launch(const RescoreParams& params, Stream stream);
void rescore_gradients_launch(const RescoreGradientsParams& params, Stream stream);

}  // namespace knnext
