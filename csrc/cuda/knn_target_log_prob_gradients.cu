// The gradients of knn_target_log_prob on CUDA, one block of 128 threads a row: with p the sum of
// a_i over the target's neighbors, each of those has the share g a_i / p, in log space, because p
// may be too small for a number.
//
// Read: 8 to 12 k bytes a row; written: 4 k + 4.
#include "cuda/mixing/neighbor_gradients.cuh"

namespace knnext {
namespace {

__global__ void __launch_bounds__(128, 8)
    knn_target_log_prob_gradients_kernel(KnnTargetLogProbGradientsParams p) {
  const int64_t r = blockIdx.x;
  NeighborRow row(p.neighbors, r);
  row.survey(std::numeric_limits<int64_t>::max());
  const float log_p = p.log_prob[r * p.log_prob_stride], grad = p.grad[r * p.grad_stride];
  if (row.state == RowState::kNan) return fill_neighbor_gradients(p.out, r, row.k, NAN);
  if (row.state == RowState::kNone || isinf(log_p))
    return fill_neighbor_gradients(p.out, r, row.k, 0.0f);
  const int64_t target = integer_at(p.targets, p.narrow_targets, r * p.target_stride);
  const float log_total = logf(row.total);
  write_neighbor_gradients(p.out, r, row, [&](int i) {
    return row.token(i) == target ? grad * expf(log_weight(row, i, log_total) - log_p) : 0.0f;
  });
}

}  // namespace

void knn_target_log_prob_gradients_launch(const KnnTargetLogProbGradientsParams& params,
                                          Stream stream) {
  if (!params.neighbors.rows) return;
  launch(knn_target_log_prob_gradients_kernel, grid_of(params.neighbors.rows), dim3(128), 0, stream,
         params);
}

}  // namespace knnext

#ifndef KNNEXT_EMULATOR

#include <tuple>

#include "boxing.h"
#include "cuda/tensors.h"

namespace knnext {
namespace {

constexpr const char* kOp = "knn_target_log_prob";

template <class Number>  // double or Tensor
std::tuple<Tensor, Tensor> knn_target_log_prob_gradients_cuda(
    const Tensor& grad, const Tensor& distances, const Tensor& tokens, const Tensor& targets,
    const Tensor& output, const Number& temperature) {
  const MixShape shape = check_neighbors(kOp, distances, tokens);
  check_targets(kOp, targets, distances);
  check_output_rows(kOp, "grad", grad, distances);
  check_output_rows(kOp, "output", output, distances);
  check_temperature(kOp, temperature, distances);
  check_max_k(kOp, shape.k);
  const OnDevice device(distances);
  const Rows d(distances), ids(tokens);
  const NeighborOutputs out(distances, shape);
  knn_target_log_prob_gradients_launch(
      {neighbors_of(d, ids, tokens, shape, row_parameter(temperature)), targets.const_data_ptr(),
       targets.stride(0), targets.scalar_type() == ScalarType::Int, grad.const_data_ptr<float>(),
       output.const_data_ptr<float>(), grad.stride(0), output.stride(0), out.pointers()},
      device.stream());
  return {out.distances, out.temperature};
}

}  // namespace
}  // namespace knnext

STABLE_TORCH_LIBRARY_IMPL(knnext, CUDA, m) {
  KNNEXT_IMPL(m, "_knn_target_log_prob_gradients",
              knnext::knn_target_log_prob_gradients_cuda<double>);
  KNNEXT_IMPL(m, "_knn_target_log_prob_gradients.tensor",
              knnext::knn_target_log_prob_gradients_cuda<knnext::Tensor>);
}
#endif
