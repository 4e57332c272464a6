// knn_target_log_prob on the CPU: two sums a row, each around its own nearest neighbor, as in
// neighbors.h; with one token to look at, nothing needs grouping.

#include <cmath>
#include <vector>

#include "boxing.h"
#include "cpu/mixing/arguments.h"
#include "cpu/vector/row_loops.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

constexpr const char* kOp = "knn_target_log_prob";

template <class T, class Token>
auto pick(const RowLoops<T>& loops) {
  if constexpr (sizeof(Token) == 4)
    return std::pair(loops.clean_int32, loops.match_int32);
  else
    return std::pair(loops.clean_int64, loops.match_int64);
}

// One thread's work: its scratch, and one row after the other.
template <class T, class Token>
class TargetRow {
 public:
  explicit TargetRow(int64_t k) : k_(k), clean_(k), matching_(k) {}

  // False where a token lies below -1, which bad_token() then gives.
  bool read(const T* distances, const Token* tokens) {
    tokens_ = tokens;
    found_ = pick<T, Token>(loops_).first(distances, tokens, k_, clean_.data());
    return found_.lowest >= -1;
  }
  int64_t bad_token() const { return found_.lowest; }

  T log_prob(int64_t target, T temperature) {
    constexpr T inf = std::numeric_limits<T>::infinity();
    if (found_.has_nan || found_.nearest == -inf) return std::numeric_limits<T>::quiet_NaN();
    if (target < 0) return -inf;
    const auto match = pick<T, Token>(loops_).second;
    const T nearest = match(clean_.data(), tokens_, target, k_, matching_.data());
    if (nearest == inf) return -inf;
    const double all = loops_.sum_exp(clean_.data(), k_, found_.nearest, temperature);
    const double own = loops_.sum_exp(matching_.data(), k_, nearest, temperature);
    return static_cast<T>((found_.nearest - nearest) / temperature + std::log(own / all));
  }

 private:
  const RowLoops<T>& loops_ = row_loops<T>();
  int64_t k_;
  std::vector<T> clean_, matching_;
  const Token* tokens_ = nullptr;
  Survey<T> found_{};
};

Tensor run(const Tensor& distances, const Tensor& tokens, const Tensor& targets,
           const RowParameter& temperature, const MixShape& shape) {
  Tensor out = empty_on<1>(distances, {shape.num_queries}, distances.scalar_type());
  const Rows d(distances), ids(tokens);
  const Targets wanted(targets);
  BadToken bad;
  with_types(shape.wide, tokens, [&]<class T, class Token>() {
    T* to = out.mutable_data_ptr<T>();
    for_rows(shape.num_queries, 4 * shape.k, [&](int64_t begin, int64_t end) {
      TargetRow<T, Token> row_work(shape.k);
      for (int64_t row = begin; row < end; ++row) {
        if (!row_work.read(d.as<T>(row), ids.as<Token>(row)))
          return bad.report(row, row_work.bad_token());
        to[row] = row_work.log_prob(wanted[row], clamped_temperature<T>(temperature[row]));
      }
    });
  });
  bad.fail_if_any(kOp, -1);
  return out;
}

template <class Number>  // double or Tensor
Tensor knn_target_log_prob_cpu(const Tensor& distances, const Tensor& tokens, const Tensor& targets,
                               const Number& temperature) {
  const MixShape shape = check_neighbors(kOp, distances, tokens);
  check_targets(kOp, targets, distances);
  check_temperature(kOp, temperature, distances);
  return run(distances, tokens, targets, RowParameter::temperature(kOp, temperature), shape);
}

}  // namespace
}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "knn_target_log_prob", knnext::cpu::knn_target_log_prob_cpu<double>);
  KNNEXT_IMPL(m, "knn_target_log_prob.tensor",
              knnext::cpu::knn_target_log_prob_cpu<knnext::Tensor>);
}
