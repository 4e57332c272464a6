// The gradients of knn_interpolate on the CPU; the formulas are in mix_gradients.h.

#include <tuple>

#include "boxing.h"
#include "cpu/mixing/mix_gradients.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

constexpr const char* kOp = "knn_interpolate";

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Needs {
  bool logits, lmbda;
};

struct Inputs {
  Rows grad, mixed, logits, distances, tokens;
  const RowParameter &temperature, &lmbda;
};

// What is not needed has no rows.
struct Outputs {
  NeighborOutputs neighbors;
  Tensor logits, lmbda;

  Outputs(const Tensor& lm_logits, const Tensor& distances, const MixShape& shape, Needs needs)
      : neighbors(distances, shape),
        logits(new_output(lm_logits, needs.logits ? shape.num_queries : 0, shape.vocab_size,
                          lm_logits.scalar_type())),
        lmbda(empty_on<1>(distances, {needs.lmbda ? shape.num_queries : 0},
                          distances.scalar_type())) {}
  void* logits_row(int64_t row) {
    const int64_t bytes = logits.size(1) * item_bytes(logits.scalar_type());
    return static_cast<char*>(logits.mutable_data_ptr()) + row * bytes;
  }
};

// One row whose neighbors are read; `mix` is the thread's own.
template <class T, class Token>
void write_row(MixGradients<T>& mix, const Inputs& in, int64_t row, Needs needs, Outputs& out) {
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  NeighborGradients<T>& neighbors = mix.neighbors();
  const RowState state = neighbors.state();
  const bool some = state == RowState::kSome;
  // A row without a neighbor is the LM alone.
  mix.begin(in.grad.as<T>(row), in.mixed.as<T>(row), in.logits.at(row), some ? in.lmbda[row] : 0);
  T to_lmbda = state == RowState::kNan ? nan : T{0};
  if (some) {
    const T t = clamped_temperature<T>(in.temperature[row]);
    neighbors.weigh(t);
    mix.share(in.tokens.as<Token>(row));
    out.neighbors.write(row, neighbors, t);
    if (needs.lmbda) to_lmbda = mix.neighbors_to_lmbda();
  } else {
    out.neighbors.fill(row, to_lmbda);
  }
  if (needs.logits || needs.lmbda) mix.survey_lm(needs.lmbda);
  if (needs.lmbda)
    out.lmbda.mutable_data_ptr<T>()[row] = some ? to_lmbda - mix.lm_to_lmbda() : to_lmbda;
  if (!needs.logits) return;
  if (state == RowState::kNan)
    mix.write_nan(out.logits_row(row));
  else
    mix.write_logits(out.logits_row(row));
}

Gradients run(const Tensor& grad, const Tensor& lm_logits, const Tensor& distances,
              const Tensor& tokens, const Tensor& output, const RowParameter& temperature,
              const RowParameter& lmbda, const MixShape& shape, Needs needs) {
  Outputs out(lm_logits, distances, shape, needs);
  const Inputs in{Rows(grad),  Rows(output), Rows(lm_logits), Rows(distances), Rows(tokens),
                  temperature, lmbda};
  const int kind = logits_kind(lm_logits);
  const int64_t work = (needs.logits || needs.lmbda ? 4 * shape.vocab_size : 0) + 16 * shape.k;
  BadToken bad;
  with_types(shape.wide, tokens, [&]<class T, class Token>() {
    for_rows(shape.num_queries, work, [&](int64_t begin, int64_t end) {
      MixGradients<T> mix(kind, shape.vocab_size);
      auto& neighbors = mix.neighbors();
      for (int64_t row = begin; row < end; ++row) {
        if (!neighbors.read(in.distances.as<T>(row), in.tokens.as<Token>(row), shape.k,
                            shape.vocab_size))
          return bad.report(row, neighbors.bad_token());
        write_row<T, Token>(mix, in, row, needs, out);
      }
    });
  });
  bad.fail_if_any(kOp, shape.vocab_size);
  return {out.logits, out.neighbors.distances, out.neighbors.temperature, out.lmbda};
}

template <class Number>  // double or Tensor
Gradients knn_interpolate_gradients_cpu(const Tensor& grad, const Tensor& lm_logits,
                                        const Tensor& distances, const Tensor& tokens,
                                        const Tensor& output, const Number& temperature,
                                        const Number& lmbda, bool need_logits, bool need_lmbda) {
  MixShape shape = check_neighbors(kOp, distances, tokens);
  check_lm_logits(kOp, lm_logits, distances);
  shape.vocab_size = lm_logits.size(1);
  check_output(kOp, "grad", grad, distances, shape.vocab_size);
  check_output(kOp, "output", output, distances, shape.vocab_size);
  check_temperature(kOp, temperature, distances);
  check_lmbda(kOp, lmbda, distances);
  return run(grad, lm_logits, distances, tokens, output,
             RowParameter::temperature(kOp, temperature), RowParameter::lmbda(kOp, lmbda), shape,
             {need_logits, need_lmbda});
}

}  // namespace
}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "_knn_interpolate_gradients", knnext::cpu::knn_interpolate_gradients_cpu<double>);
  KNNEXT_IMPL(m, "_knn_interpolate_gradients.tensor",
              knnext::cpu::knn_interpolate_gradients_cpu<knnext::Tensor>);
}
