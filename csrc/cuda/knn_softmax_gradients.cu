// The gradients of knn_softmax on CUDA, one block of 128 threads a row: neighbor i has the share
// a_i g[token_i]; the row of g is only read where a neighbor points.
//
// Read: 8 to 12 k bytes a row and a sector of g for each token; written: 4 k + 4.
#include "cuda/mixing/neighbor_gradients.cuh"

namespace knnext {
namespace {

__global__ void __launch_bounds__(128, 8)
    knn_softmax_gradients_kernel(KnnSoftmaxGradientsParams p) {
  const int64_t r = blockIdx.x;
  NeighborRow row(p.neighbors, r);
  row.survey(p.vocab_size);
  if (row.state != RowState::kSome)
    return fill_neighbor_gradients(p.out, r, row.k, row.state == RowState::kNan ? NAN : 0.0f);
  const float* grad = p.grad + r * p.grad_stride;
  write_neighbor_gradients(
      p.out, r, row, [&](int i) { return expf(row.logit(i)) / row.total * grad[row.token(i)]; });
}

}  // namespace

void knn_softmax_gradients_launch(const KnnSoftmaxGradientsParams& params, Stream stream) {
  if (!params.neighbors.rows) return;
  launch(knn_softmax_gradients_kernel, grid_of(params.neighbors.rows), dim3(128), 0, stream,
         params);
}

}  // namespace knnext

#ifndef KNNEXT_EMULATOR

#include <tuple>

#include "boxing.h"
#include "cuda/tensors.h"

namespace knnext {
namespace {

constexpr const char* kOp = "knn_softmax";

template <class Number>  // double or Tensor
std::tuple<Tensor, Tensor> knn_softmax_gradients_cuda(const Tensor& grad, const Tensor& distances,
                                                      const Tensor& tokens,
                                                      const Number& temperature) {
  const MixShape shape = check_neighbors(kOp, distances, tokens);
  check_output(kOp, "grad", grad, distances, -1);
  check_temperature(kOp, temperature, distances);
  check_max_k(kOp, shape.k);
  const OnDevice device(distances);
  const Rows g(grad), d(distances), ids(tokens);
  const NeighborOutputs out(distances, shape);
  knn_softmax_gradients_launch({neighbors_of(d, ids, tokens, shape, row_parameter(temperature)),
                                g.as<float>(), g.stride(), grad.size(1), out.pointers()},
                               device.stream());
  return {out.distances, out.temperature};
}

}  // namespace
}  // namespace knnext

STABLE_TORCH_LIBRARY_IMPL(knnext, CUDA, m) {
  KNNEXT_IMPL(m, "_knn_softmax_gradients", knnext::knn_softmax_gradients_cuda<double>);
  KNNEXT_IMPL(m, "_knn_softmax_gradients.tensor",
              knnext::knn_softmax_gradients_cuda<knnext::Tensor>);
}
#endif
