// knn_interpolate on CUDA: log((1 - lmbda) softmax(logits) + lmbda p_knn), one block a row where
// rows are many (else mixing/row_pieces.cuh).
//
//   logits (V) --> max, sum of exp; the row, or as much of it as fits, stays in shared memory
//   out (V)    <-- x - max - log(sum) + log(1 - lmbda), 16 bytes a store; drains during the sort
//   words (k)  --> sorted by token, summed by token --> out[token] = logaddexp(out[token], ...)
//
// Read: the row of logits once (what did not fit into shared memory a second time, from the L2) and
// 8 to 12 k bytes of neighbors; written: 4 V bytes, and a sector for each token, still in the L2.
#include "cuda/mixing/row_pieces.cuh"

namespace knnext {
namespace {

template <class T, class Word>
__global__ void __launch_bounds__(1024, 1)
    knn_interpolate_kernel(KnnInterpolateParams p, SortPlan plan, int64_t max_cached) {
  const int64_t r = blockIdx.x;
  float* out = p.out + r * p.vocab_size;
  NeighborRow row(p.neighbors, r);
  row.survey(p.vocab_size);
  const double lmbda = lmbda_at(p.lmbda, row, r);
  const LogitRow<T> lm(static_cast<const T*>(p.logits) + r * p.logits_stride, out, p.vocab_size,
                       max_cached);
  const LogSum total = lm.log_sum();
  lm.write(total.peak, logf(static_cast<float>(1.0 - lmbda)) - logf(total.sum));
  if (!(lmbda > 0)) return;
  __syncthreads();  // the words lie where the logits were kept
  const SortedTokens<Word> sorted(plan, p.workspace, r);
  sorted.sort(row);
  const float log_lmbda = logf(static_cast<float>(lmbda));
  sum_by_token(sorted, row, [&](int64_t token, LogSum sum) {
    const float log_p_knn = sum.peak + logf(sum.sum / row.total);
    out[token] = log_add_exp(out[token], log_p_knn + log_lmbda);
  });
}

// Threads, shared memory and how much of a row it keeps. With many rows two blocks share an SM, so
// that one reads while the other writes or sorts.
struct MixLaunch {
  unsigned threads;
  size_t bytes;
  int64_t cached;

  MixLaunch(const KnnInterpolateParams& p, const SortPlan& plan, size_t element_bytes) {
    const bool many = p.neighbors.rows >= 256;
    const size_t limit = shared_memory_limit() - 4096, chunk_bytes = kChunk * element_bytes;
    const size_t budget = many ? limit / 2 : limit;
    threads = many ? 512 : 1024;
    cached = min(p.vocab_size / kChunk, static_cast<int64_t>(budget / chunk_bytes));
    bytes = max(static_cast<size_t>(cached) * chunk_bytes, p.workspace ? 0 : plan.bytes());
  }
};

template <class T>
void launch_dtype(const KnnInterpolateParams& params, Stream stream) {
  const SortPlan plan(params.neighbors.k, params.vocab_size);
  if (params.split) {
    const SplitPlan split(params.neighbors.rows, params.neighbors.k, params.vocab_size);
    return plan.narrow ? launch_split<T, unsigned>(params, plan, split, stream)
                       : launch_split<T, unsigned long long>(params, plan, split, stream);
  }
  const MixLaunch shape(params, plan, sizeof(T));
  const dim3 grid = grid_of(params.neighbors.rows), block(shape.threads);
  if (plan.narrow)
    launch(knn_interpolate_kernel<T, unsigned>, grid, block, shape.bytes, stream, params, plan,
           shape.cached);
  else
    launch(knn_interpolate_kernel<T, unsigned long long>, grid, block, shape.bytes, stream, params,
           plan, shape.cached);
}

}  // namespace

int64_t split_words(const KnnInterpolateParams& p) {
  const SplitPlan plan(p.neighbors.rows, p.neighbors.k, p.vocab_size);
  return plan.pieces ? p.neighbors.rows * plan.words_a_row(p.neighbors.k) : 0;
}

void knn_interpolate_launch(const KnnInterpolateParams& params, Stream stream) {
  if (!params.neighbors.rows) return;
  with_logit_type(params.logits_dtype, [&]<class T>() { launch_dtype<T>(params, stream); });
}

}  // namespace knnext

#ifndef KNNEXT_EMULATOR

#include "boxing.h"
#include "cuda/tensors.h"

namespace knnext {
namespace {

constexpr const char* kOp = "knn_interpolate";

template <class Number>  // double or Tensor
Tensor knn_interpolate_cuda(const Tensor& lm_logits, const Tensor& distances, const Tensor& tokens,
                            const Number& temperature, const Number& lmbda) {
  MixShape shape = check_neighbors(kOp, distances, tokens);
  check_lm_logits(kOp, lm_logits, distances);
  check_temperature(kOp, temperature, distances);
  check_lmbda(kOp, lmbda, distances);
  check_max_k(kOp, shape.k);
  shape.vocab_size = lm_logits.size(1);
  const OnDevice device(distances);
  const Rows logits(lm_logits), d(distances), ids(tokens);
  Tensor out = empty_on<2>(distances, {shape.num_queries, shape.vocab_size}, ScalarType::Float);
  KnnInterpolateParams params{neighbors_of(d, ids, tokens, shape, row_parameter(temperature)),
                              logits.data(),
                              logits.stride(),
                              dtype_of(lm_logits),
                              row_parameter(lmbda),
                              shape.vocab_size,
                              out.mutable_data_ptr<float>(),
                              nullptr,
                              nullptr};
  const Workspace workspace(distances, sort_workspace_words(params.neighbors, shape.vocab_size));
  const Workspace split(distances, split_words(params));
  params.workspace = workspace.words();
  params.split = split.words();
  knn_interpolate_launch(params, device.stream());
  return out;
}

}  // namespace
}  // namespace knnext

STABLE_TORCH_LIBRARY_IMPL(knnext, CUDA, m) {
  KNNEXT_IMPL(m, "knn_interpolate", knnext::knn_interpolate_cuda<double>);
  KNNEXT_IMPL(m, "knn_interpolate.tensor", knnext::knn_interpolate_cuda<knnext::Tensor>);
}
#endif
