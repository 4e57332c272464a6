// knn_softmax on CUDA: p_knn over the whole vocabulary, one block a row.
//
//   distances, tokens (k) --> nearest, Z
//   out (V)               <-- zeros, 16 bytes a store; they drain while the block sorts (where rows
//                             are few, the whole device sets them before)
//   words (k, shared)     --> sorted by token, summed by token --> out[token] = p, over the zeros
//
// Read: 8 to 12 k bytes a row; written: 4 V bytes, and a sector for each token, still in the L2.
#include "cuda/mixing/neighbors.cuh"

namespace knnext {
namespace {

__device__ __forceinline__ void fill_row(float* out, int64_t size, float value) {
  // Rows of an odd vocabulary begin anywhere: single elements up to the first 16-byte boundary.
  const int64_t skew = reinterpret_cast<uintptr_t>(out) / 4 % 4, head = min(size, (4 - skew) % 4);
  const int64_t vectors = (size - head) / 4, tail = head + 4 * vectors;
  if (threadIdx.x < head) out[threadIdx.x] = value;
  auto* body = reinterpret_cast<float4*>(out + head);
  for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x)
    body[i] = make_float4(value, value, value, value);
  if (tail + threadIdx.x < size) out[tail + threadIdx.x] = value;
}

template <class Word>
__global__ void __launch_bounds__(1024, 1)
    knn_softmax_kernel(KnnSoftmaxParams p, SortPlan plan, bool filled) {
  const int64_t r = blockIdx.x;
  float* out = p.out + r * p.vocab_size;
  NeighborRow row(p.neighbors, r);
  row.survey(p.vocab_size);
  if (!filled || row.state == RowState::kNan)
    fill_row(out, p.vocab_size, row.state == RowState::kNan ? NAN : 0.0f);
  if (row.state != RowState::kSome) return;
  const SortedTokens<Word> sorted(plan, p.workspace, r);
  sorted.sort(row);  // its barriers come between the zeros and what overwrites them
  sum_by_token(sorted, row, [&](int64_t token, LogSum sum) {
    out[token] = expf(sum.peak) * sum.sum / row.total;
  });
}

}  // namespace

int64_t sort_workspace_words(const Neighbors& neighbors, int64_t vocab_size) {
  const SortPlan plan(neighbors.k, vocab_size);
  return plan.fits_shared() ? 0 : neighbors.rows * plan.n;
}

void knn_softmax_launch(const KnnSoftmaxParams& params, Stream stream) {
  if (!params.neighbors.rows) return;
  const SortPlan plan(params.neighbors.k, params.vocab_size);
  // Many rows fill the device by themselves; few need every thread that a block may have.
  const dim3 grid = grid_of(params.neighbors.rows),
             block(params.neighbors.rows >= 512 ? 256 : 1024);
  const size_t bytes = params.workspace ? 0 : plan.bytes();
  const bool filled = params.neighbors.rows <= 32 && params.vocab_size >= 8192;
  if (filled) zero_memory(params.out, params.neighbors.rows * params.vocab_size * 4, stream);
  if (plan.narrow)
    launch(knn_softmax_kernel<unsigned>, grid, block, bytes, stream, params, plan, filled);
  else
    launch(knn_softmax_kernel<unsigned long long>, grid, block, bytes, stream, params, plan,
           filled);
}

}  // namespace knnext

#ifndef KNNEXT_EMULATOR

#include "boxing.h"
#include "cuda/tensors.h"

namespace knnext {
namespace {

constexpr const char* kOp = "knn_softmax";

template <class Number>  // double or Tensor
Tensor knn_softmax_cuda(const Tensor& distances, const Tensor& tokens, const Number& temperature,
                        int64_t vocab_size) {
  const MixShape shape = check_neighbors(kOp, distances, tokens);
  check_temperature(kOp, temperature, distances);
  check_vocab_size(kOp, vocab_size);
  check_max_k(kOp, shape.k);
  const OnDevice device(distances);
  const Rows d(distances), ids(tokens);
  Tensor out = empty_on<2>(distances, {shape.num_queries, vocab_size}, ScalarType::Float);
  KnnSoftmaxParams params{neighbors_of(d, ids, tokens, shape, row_parameter(temperature)),
                          vocab_size, out.mutable_data_ptr<float>(), nullptr};
  const Workspace workspace(distances, sort_workspace_words(params.neighbors, vocab_size));
  params.workspace = workspace.words();
  knn_softmax_launch(params, device.stream());
  return out;
}

}  // namespace
}  // namespace knnext

STABLE_TORCH_LIBRARY_IMPL(knnext, CUDA, m) {
  KNNEXT_IMPL(m, "knn_softmax", knnext::knn_softmax_cuda<double>);
  KNNEXT_IMPL(m, "knn_softmax.tensor", knnext::knn_softmax_cuda<knnext::Tensor>);
}
#endif
