// knn_interpolate on the CPU: one pass over a row of logits for max and sum, one that writes
// log((1 - lmbda) p_lm), then log p_knn is added in where a neighbor has the token.

#include <algorithm>
#include <cmath>

#include "boxing.h"
#include "cpu/mixing/arguments.h"
#include "cpu/mixing/neighbors.h"

namespace knnext::cpu {
namespace {

constexpr const char* kOp = "knn_interpolate";

template <class T>
class Mixer {
 public:
  Mixer(int logits_kind, int64_t vocab_size) : kind_(logits_kind), vocab_size_(vocab_size) {}

  template <class Token>
  bool read(const T* distances, const Token* tokens, int64_t k) {
    return neighbors_.read(distances, tokens, k, vocab_size_);
  }
  int64_t bad_token() const { return neighbors_.bad_token(); }

  void write_row(const void* logits, T temperature, double lmbda, T* out) {
    if (neighbors_.state() == RowState::kNan)
      return void(std::fill_n(out, vocab_size_, std::numeric_limits<T>::quiet_NaN()));
    // A row without a neighbor is the LM alone.
    const double weight = neighbors_.state() == RowState::kSome ? lmbda : 0.0;
    const MaxSum<T> lm = loops_.max_sum[kind_](logits, vocab_size_);
    const T offset = static_cast<T>(std::log(lm.sum) - std::log1p(-weight));
    loops_.shift[kind_](logits, vocab_size_, lm.max, offset, out);
    if (weight > 0) add_neighbors(temperature, static_cast<T>(std::log(weight)), out);
  }

 private:
  void add_neighbors(T temperature, T log_lmbda, T* out) {
    neighbors_.to_log_weights(temperature);
    const size_t size = neighbors_.size();
    const int64_t* tokens = neighbors_.tokens();
    T* log_p = neighbors_.values();
    mixed_.resize(size);
    for (size_t j = 0; j < size; ++j) log_p[j] += log_lmbda;
    for (size_t j = 0; j < size; ++j) mixed_[j] = out[tokens[j]];
    loops_.log_add_exp(mixed_.data(), log_p, size);
    for (size_t j = 0; j < size; ++j) out[tokens[j]] = mixed_[j];
  }

  const RowLoops<T>& loops_ = row_loops<T>();
  Neighbors<T> neighbors_;
  std::vector<T> mixed_;
  int kind_;
  int64_t vocab_size_;
};

Tensor run(const Tensor& lm_logits, const Tensor& distances, const Tensor& tokens,
           const RowParameter& temperature, const RowParameter& lmbda, const MixShape& shape) {
  Tensor out = new_output(distances, shape.num_queries, shape.vocab_size, distances.scalar_type());
  const Rows logits(lm_logits), d(distances), ids(tokens);
  const int kind = logits_kind(lm_logits);
  BadToken bad;
  with_types(shape.wide, tokens, [&]<class T, class Token>() {
    T* to = out.mutable_data_ptr<T>();
    for_rows(shape.num_queries, 2 * shape.vocab_size + 8 * shape.k, [&](int64_t a, int64_t b) {
      Mixer<T> mixer(kind, shape.vocab_size);
      for (int64_t row = a; row < b; ++row) {
        if (!mixer.read(d.as<T>(row), ids.as<Token>(row), shape.k))
          return bad.report(row, mixer.bad_token());
        mixer.write_row(logits.at(row), clamped_temperature<T>(temperature[row]), lmbda[row],
                        to + row * shape.vocab_size);
      }
    });
  });
  bad.fail_if_any(kOp, shape.vocab_size);
  return out;
}

template <class Number>  // double or Tensor
Tensor knn_interpolate_cpu(const Tensor& lm_logits, const Tensor& distances, const Tensor& tokens,
                           const Number& temperature, const Number& lmbda) {
  MixShape shape = check_neighbors(kOp, distances, tokens);
  check_lm_logits(kOp, lm_logits, distances);
  check_temperature(kOp, temperature, distances);
  check_lmbda(kOp, lmbda, distances);
  shape.vocab_size = lm_logits.size(1);
  return run(lm_logits, distances, tokens, RowParameter::temperature(kOp, temperature),
             RowParameter::lmbda(kOp, lmbda), shape);
}

}  // namespace
}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "knn_interpolate", knnext::cpu::knn_interpolate_cpu<double>);
  KNNEXT_IMPL(m, "knn_interpolate.tensor", knnext::cpu::knn_interpolate_cpu<knnext::Tensor>);
}
