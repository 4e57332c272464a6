// The plain float32 path, the float64 loops, and the choice between paths.
#include "cpu/vector/row_loops.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/isa.h"
#include "cpu/vector/row_loops_float.h"

namespace knnext::cpu {

extern const RowLoops<float> kRowLoopsPlain = kLoopsOfThisPath;
extern const SumLoops kSumLoopsPlain = kSumLoopsOfThisPath;

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class Token>
Survey<double> clean_wide(const double* distances, const Token* tokens, int64_t k, double* out) {
  Survey<double> found{kInfinity, false, 0, -1};
  for (int64_t i = 0; i < k; ++i) {
    const int64_t token = tokens[i];
    out[i] = token < 0 ? kInfinity : distances[i];
    found.lowest = std::min(found.lowest, token);
    found.highest = std::max(found.highest, token);
    found.has_nan |= std::isnan(out[i]);
    found.nearest = std::min(found.nearest, out[i]);
  }
  return found;
}

template <class Token>
double match_wide(const double* distances, const Token* tokens, int64_t target, int64_t k,
                  double* out) {
  for (int64_t i = 0; i < k; ++i) out[i] = tokens[i] == target ? distances[i] : kInfinity;
  return k ? *std::min_element(out, out + k) : kInfinity;
}

double sum_exp_wide(const double* distances, int64_t k, double nearest, double temperature) {
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += std::exp((nearest - distances[i]) / temperature);
  return sum;
}

void exp_wide(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::exp(x[i]);
}

void log_wide(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::log(x[i]);
}

void log_add_exp_wide(double* a, const double* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double high = std::max(a[i], b[i]), low = std::min(a[i], b[i]);
    a[i] = high == -kInfinity ? high : high + std::log1p(std::exp(low - high));
  }
}

template <class L>
MaxSum<double> max_sum_wide(const void* logits, int64_t n) {
  const L* x = static_cast<const L*>(logits);
  MaxSum<double> found{-kInfinity, 0};
  for (int64_t i = 0; i < n; ++i) found.max = std::max<double>(found.max, x[i]);
  const double shift = found.max == -kInfinity ? 0 : found.max;
  for (int64_t i = 0; i < n; ++i) found.sum += std::exp(static_cast<double>(x[i]) - shift);
  return found;
}

template <class L>
void shift_wide(const void* logits, int64_t n, double max, double offset, double* out) {
  const L* x = static_cast<const L*>(logits);
  for (int64_t i = 0; i < n; ++i) out[i] = (static_cast<double>(x[i]) - max) - offset;
}

template <class L>
GradSums grad_sums_wide(const void* logits, const double* grad, int64_t n) {
  const L* x = static_cast<const L*>(logits);
  GradSums total{0, 0};
  for (int64_t i = 0; i < n; ++i) {
    total.all += grad[i];
    if (static_cast<double>(x[i]) != -kInfinity) total.live += grad[i];
  }
  return total;
}

template <class L>
void logit_gradient_wide(const void* logits, const double* grad, int64_t n, double max, double keep,
                         double scale, void* out) {
  const L* x = static_cast<const L*>(logits);
  for (int64_t i = 0; i < n; ++i)
    static_cast<L*>(out)[i] =
        static_cast<L>(keep * grad[i] - scale * std::exp(static_cast<double>(x[i]) - max));
}

template <class L>
void gather_wide(const void* row, const int64_t* at, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(static_cast<const L*>(row)[at[i]]);
}

template <class L>
void scatter_wide(const double* values, const int64_t* at, int64_t n, void* row) {
  for (int64_t i = 0; i < n; ++i) static_cast<L*>(row)[at[i]] = static_cast<L>(values[i]);
}

#define KNNEXT_EACH(loop) {loop<Half>, loop<BFloat16>, loop<float>, loop<double>}

constexpr RowLoops<double> kRowLoopsWide = {
    clean_wide<int32_t>,
    clean_wide<int64_t>,
    match_wide<int32_t>,
    match_wide<int64_t>,
    sum_exp_wide,
    exp_wide,
    log_wide,
    log_add_exp_wide,
    KNNEXT_EACH(max_sum_wide),
    KNNEXT_EACH(shift_wide),
    KNNEXT_EACH(grad_sums_wide),
    KNNEXT_EACH(logit_gradient_wide),
    KNNEXT_EACH(gather_wide),
    KNNEXT_EACH(scatter_wide),
};

}  // namespace

template <>
const RowLoops<double>& row_loops<double>() {
  return kRowLoopsWide;
}

template <>
const RowLoops<float>& row_loops<float>() {
#if defined(__x86_64__)
  if (float_isa() == Isa::kAvx512) return kRowLoopsAvx512;
  if (float_isa() == Isa::kAvx2) return kRowLoopsAvx2;
#elif defined(__aarch64__)
  if (float_isa() == Isa::kNeon) return kRowLoopsNeon;
#endif
  return kRowLoopsPlain;
}

const SumLoops& sum_loops() {
#if defined(__x86_64__)
  if (float_isa() == Isa::kAvx512) return kSumLoopsAvx512;
  if (float_isa() == Isa::kAvx2) return kSumLoopsAvx2;
#elif defined(__aarch64__)
  if (float_isa() == Isa::kNeon) return kSumLoopsNeon;
#endif
  return kSumLoopsPlain;
}

}  // namespace knnext::cpu
