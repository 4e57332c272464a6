// knn_softmax on the CPU: a row is filled with zeros and, while still in cache, given its
// neighbors.

#include <algorithm>

#include "boxing.h"
#include "cpu/mixing/arguments.h"
#include "cpu/mixing/neighbors.h"

namespace knnext::cpu {
namespace {

constexpr const char* kOp = "knn_softmax";

template <class T>
void write_row(Neighbors<T>& neighbors, T temperature, int64_t vocab_size, T* out) {
  const bool nan = neighbors.state() == RowState::kNan;
  std::fill_n(out, vocab_size, nan ? std::numeric_limits<T>::quiet_NaN() : T{0});
  if (neighbors.state() != RowState::kSome) return;
  neighbors.to_weights(temperature);
  const int64_t* tokens = neighbors.tokens();
  const T* p_knn = neighbors.values();
  for (size_t j = 0; j < neighbors.size(); ++j) out[tokens[j]] = p_knn[j];
}

Tensor run(const Tensor& distances, const Tensor& tokens, const RowParameter& temperature,
           const MixShape& shape) {
  Tensor out = new_output(distances, shape.num_queries, shape.vocab_size, distances.scalar_type());
  const Rows d(distances), ids(tokens);
  BadToken bad;
  with_types(shape.wide, tokens, [&]<class T, class Token>() {
    T* to = out.mutable_data_ptr<T>();
    for_rows(shape.num_queries, shape.vocab_size + 8 * shape.k, [&](int64_t begin, int64_t end) {
      Neighbors<T> neighbors;
      for (int64_t row = begin; row < end; ++row) {
        if (!neighbors.read(d.as<T>(row), ids.as<Token>(row), shape.k, shape.vocab_size))
          return bad.report(row, neighbors.bad_token());
        write_row<T>(neighbors, clamped_temperature<T>(temperature[row]), shape.vocab_size,
                     to + row * shape.vocab_size);
      }
    });
  });
  bad.fail_if_any(kOp, shape.vocab_size);
  return out;
}

template <class Number>  // double or Tensor
Tensor knn_softmax_cpu(const Tensor& distances, const Tensor& tokens, const Number& temperature,
                       int64_t vocab_size) {
  MixShape shape = check_neighbors(kOp, distances, tokens);
  check_temperature(kOp, temperature, distances);
  check_vocab_size(kOp, vocab_size);
  shape.vocab_size = vocab_size;
  return run(distances, tokens, RowParameter::temperature(kOp, temperature), shape);
}

}  // namespace
}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "knn_softmax", knnext::cpu::knn_softmax_cpu<double>);
  KNNEXT_IMPL(m, "knn_softmax.tensor", knnext::cpu::knn_softmax_cpu<knnext::Tensor>);
}
