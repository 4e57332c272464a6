// knn_target_log_prob on CUDA: log p_knn of one token a row, one block of 128 threads a row.
//
//   distances, tokens (k) --> nearest n of all, nearest n_t of the target's
//   again, from the L1    --> Z = sum exp((n - d) / t), S = sum over the target's of exp((n_t - d)
//   / t) out                   <-- (n - n_t) / t + log(S / Z)
//
// Each sum is around its own nearest neighbor, so nothing underflows; with one token to look at,
// nothing needs sorting. Read: 8 to 12 k bytes a row; written: 4.
#include "cuda/mixing/neighbors.cuh"

namespace knnext {
namespace {

__global__ void __launch_bounds__(128, 8) knn_target_log_prob_kernel(KnnTargetLogProbParams p) {
  const int64_t r = blockIdx.x;
  NeighborRow row(p.neighbors, r);
  // Tokens have no upper bound here; a negative target matches nothing, not even padding.
  row.survey(std::numeric_limits<int64_t>::max());
  const int64_t target = integer_at(p.targets, p.narrow_targets, r * p.target_stride);
  const auto matches = [&](int i) {
    return target >= 0 && row.token(i) == target && row.distances[i] != INFINITY;
  };
  float low = INFINITY;
  for (int i = threadIdx.x; i < row.k; i += blockDim.x)
    if (matches(i)) low = fminf(low, row.distances[i]);
  const float nearest = block_reduce(low, Min{});
  float own = 0;
  for (int i = threadIdx.x; i < row.k; i += blockDim.x)
    if (matches(i)) own += expf((nearest - row.distances[i]) / row.temperature);
  own = block_reduce(own, Sum{});
  if (threadIdx.x) return;
  float log_p = -INFINITY;
  if (row.state == RowState::kNan)
    log_p = NAN;
  else if (row.state == RowState::kSome && nearest != INFINITY)
    log_p = (row.nearest - nearest) / row.temperature + logf(own / row.total);
  p.out[r] = log_p;
}

}  // namespace

void knn_target_log_prob_launch(const KnnTargetLogProbParams& params, Stream stream) {
  if (!params.neighbors.rows) return;
  launch(knn_target_log_prob_kernel, grid_of(params.neighbors.rows), dim3(128), 0, stream, params);
}

}  // namespace knnext

#ifndef KNNEXT_EMULATOR

#include "boxing.h"
#include "cuda/tensors.h"

namespace knnext {
namespace {

constexpr const char* kOp = "knn_target_log_prob";

template <class Number>  // double or Tensor
Tensor knn_target_log_prob_cuda(const Tensor& distances, const Tensor& tokens,
                                const Tensor& targets, const Number& temperature) {
  const MixShape shape = check_neighbors(kOp, distances, tokens);
  check_targets(kOp, targets, distances);
  check_temperature(kOp, temperature, distances);
  check_max_k(kOp, shape.k);
  const OnDevice device(distances);
  const Rows d(distances), ids(tokens);
  Tensor out = empty_on<1>(distances, {shape.num_queries}, ScalarType::Float);
  const KnnTargetLogProbParams params{
      neighbors_of(d, ids, tokens, shape, row_parameter(temperature)), targets.const_data_ptr(),
      targets.stride(0), targets.scalar_type() == ScalarType::Int, out.mutable_data_ptr<float>()};
  knn_target_log_prob_launch(params, device.stream());
  return out;
}

}  // namespace
}  // namespace knnext

STABLE_TORCH_LIBRARY_IMPL(knnext, CUDA, m) {
  KNNEXT_IMPL(m, "knn_target_log_prob", knnext::knn_target_log_prob_cuda<double>);
  KNNEXT_IMPL(m, "knn_target_log_prob.tensor", knnext::knn_target_log_prob_cuda<knnext::Tensor>);
}
#endif
