// The gradients of knn_target_log_prob on the CPU: with p = sum of a_i over the target's neighbors,
// each of those gets the share g a_i / p, in log space: p may be too small for a number.

#include <cmath>
#include <tuple>

#include "boxing.h"
#include "cpu/mixing/neighbor_gradients.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

constexpr const char* kOp = "knn_target_log_prob";
constexpr int64_t kNoEnd = std::numeric_limits<int64_t>::max();  // of the vocabulary

template <class T, class Token>
void share_row(NeighborGradients<T>& neighbors, const Token* tokens, int64_t target, T grad,
               T log_prob) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  const T* log_weights = neighbors.log_weights();
  T* shares = neighbors.shares();
  const std::size_t k = neighbors.size();
  for (std::size_t i = 0; i < k; ++i)
    shares[i] = tokens[i] == target ? log_weights[i] - log_prob : -inf;
  row_loops<T>().exp(shares, k);
  for (std::size_t i = 0; i < k; ++i) shares[i] *= grad;
}

std::tuple<Tensor, Tensor> run(const Tensor& grad, const Tensor& distances, const Tensor& tokens,
                               const Tensor& targets, const Tensor& output,
                               const RowParameter& temperature, const MixShape& shape) {
  NeighborOutputs out(distances, shape);
  const Rows d(distances), ids(tokens);
  const Targets wanted(targets);
  BadToken bad;
  with_types(shape.wide, tokens, [&]<class T, class Token>() {
    const T *g = grad.const_data_ptr<T>(), *log_prob = output.const_data_ptr<T>();
    for_rows(shape.num_queries, 8 * shape.k, [&](int64_t begin, int64_t end) {
      NeighborGradients<T> neighbors;
      for (int64_t row = begin; row < end; ++row) {
        const Token* at = ids.as<Token>(row);
        if (!neighbors.read(d.as<T>(row), at, shape.k, kNoEnd))
          return bad.report(row, neighbors.bad_token());
        const T log_p = log_prob[row * output.stride(0)],
                t = clamped_temperature<T>(temperature[row]);
        if (std::isinf(log_p) || neighbors.state() != RowState::kSome) {
          const bool nan = neighbors.state() == RowState::kNan;
          out.fill(row, nan ? std::numeric_limits<T>::quiet_NaN() : T{0});
          continue;
        }
        neighbors.weigh(t);
        share_row(neighbors, at, wanted[row], g[row * grad.stride(0)], log_p);
        out.write(row, neighbors, t);
      }
    });
  });
  bad.fail_if_any(kOp, -1);
  return {out.distances, out.temperature};
}

template <class Number>  // double or Tensor
std::tuple<Tensor, Tensor> knn_target_log_prob_gradients_cpu(
    const Tensor& grad, const Tensor& distances, const Tensor& tokens, const Tensor& targets,
    const Tensor& output, const Number& temperature) {
  const MixShape shape = check_neighbors(kOp, distances, tokens);
  check_targets(kOp, targets, distances);
  check_output_rows(kOp, "grad", grad, distances);
  check_output_rows(kOp, "output", output, distances);
  check_temperature(kOp, temperature, distances);
  return run(grad, distances, tokens, targets, output, RowParameter::temperature(kOp, temperature),
             shape);
}

}  // namespace
}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "_knn_target_log_prob_gradients",
              knnext::cpu::knn_target_log_prob_gradients_cpu<double>);
  KNNEXT_IMPL(m, "_knn_target_log_prob_gradients.tensor",
              knnext::cpu::knn_target_log_prob_gradients_cpu<knnext::Tensor>);
}
