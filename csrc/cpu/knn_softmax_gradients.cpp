// The gradients of knn_softmax on the CPU: p_v = sum of a_i over the neighbors of v, so neighbor i
// gets the share a_i g_v; the row of g is only read where a neighbor points.

#include <tuple>

#include "boxing.h"
#include "cpu/mixing/neighbor_gradients.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

constexpr const char* kOp = "knn_softmax";

template <class T, class Token>
void share_row(NeighborGradients<T>& neighbors, const Token* tokens, const T* grad) {
  const T* weights = neighbors.weights();
  T* shares = neighbors.shares();
  for (std::size_t i = 0; i < neighbors.size(); ++i)
    shares[i] = neighbors.weighs(i) ? weights[i] * grad[tokens[i]] : T{0};
}

std::tuple<Tensor, Tensor> run(const Tensor& grad, const Tensor& distances, const Tensor& tokens,
                               const RowParameter& temperature, const MixShape& shape) {
  NeighborOutputs out(distances, shape);
  const Rows d(distances), ids(tokens), g(grad);
  BadToken bad;
  with_types(shape.wide, tokens, [&]<class T, class Token>() {
    for_rows(shape.num_queries, 8 * shape.k, [&](int64_t begin, int64_t end) {
      NeighborGradients<T> neighbors;
      for (int64_t row = begin; row < end; ++row) {
        const Token* at = ids.as<Token>(row);
        if (!neighbors.read(d.as<T>(row), at, shape.k, shape.vocab_size))
          return bad.report(row, neighbors.bad_token());
        if (neighbors.state() != RowState::kSome) {
          const bool nan = neighbors.state() == RowState::kNan;
          out.fill(row, nan ? std::numeric_limits<T>::quiet_NaN() : T{0});
          continue;
        }
        const T t = clamped_temperature<T>(temperature[row]);
        neighbors.weigh(t);
        share_row(neighbors, at, g.as<T>(row));
        out.write(row, neighbors, t);
      }
    });
  });
  bad.fail_if_any(kOp, shape.vocab_size);
  return {out.distances, out.temperature};
}

template <class Number>  // double or Tensor
std::tuple<Tensor, Tensor> knn_softmax_gradients_cpu(const Tensor& grad, const Tensor& distances,
                                                     const Tensor& tokens,
                                                     const Number& temperature) {
  MixShape shape = check_neighbors(kOp, distances, tokens);
  check_output(kOp, "grad", grad, distances, -1);
  shape.vocab_size = grad.size(1);
  check_temperature(kOp, temperature, distances);
  return run(grad, distances, tokens, RowParameter::temperature(kOp, temperature), shape);
}

}  // namespace
}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "_knn_softmax_gradients", knnext::cpu::knn_softmax_gradients_cpu<double>);
  KNNEXT_IMPL(m, "_knn_softmax_gradients.tensor",
              knnext::cpu::knn_softmax_gradients_cpu<knnext::Tensor>);
}
