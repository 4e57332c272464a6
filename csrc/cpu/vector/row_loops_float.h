// The float32 row loops, compiled once for each vector path by row_loops*.cpp.
#pragma once

#include "cpu/vector/math.h"
#include "cpu/vector/row_loops.h"

namespace knnext::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // entries summed in float32 before a float64 takes over

// The last n < kLanes entries, the register filled up with `fill`.
template <class L>
KNNEXT_INLINE VecF load_tail(const L* p, int64_t n, float fill) {
  L buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(L));
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n) ? load(buffer) : splat(fill);
}

KNNEXT_INLINE float max_lane(VecF v) {
  float out = v[0];
  for (int i = 1; i < kLanes; ++i) out = v[i] > out ? v[i] : out;
  return out;
}

KNNEXT_INLINE double sum_lanes(VecF v) {
  double out = 0;
  for (int i = 0; i < kLanes; ++i) out += v[i];
  return out;
}

KNNEXT_INLINE void store_tail(float* p, VecF v, int64_t n) {
  std::memcpy(p, &v, n * sizeof(float));
}

// x = f(x) over a row.
template <class F>
KNNEXT_INLINE void map_row(float* x, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, f(load(x + i)));
  if (i < n) store_tail(x + i, f(load_tail(x + i, n - i, 1.0f)), n - i);
}

// Sum over a row of f(register): in float32 within a block, in four chains, in float64 beyond.
template <class L, class F>
KNNEXT_INLINE double sum_row(const L* x, int64_t n, float fill, F f) {
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = start + kBlock < n ? start + kBlock : n;
    VecF sums[4] = {};
    int64_t i = start;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
      for (int j = 0; j < 4; ++j) sums[j] += f(load(x + i + j * kLanes));
    for (; i + kLanes <= end; i += kLanes) sums[0] += f(load(x + i));
    if (i < end) sums[1] += f(load_tail(x + i, end - i, fill));
    total += sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

template <class L>
KNNEXT_INLINE float max_row(const L* x, int64_t n) {
  VecF highest[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) highest[j] = max_of(load(x + i + j * kLanes), highest[j]);
  for (; i + kLanes <= n; i += kLanes) highest[0] = max_of(load(x + i), highest[0]);
  if (i < n) highest[1] = max_of(load_tail(x + i, n - i, -kInf), highest[1]);
  return max_lane(max_of(max_of(highest[0], highest[1]), max_of(highest[2], highest[3])));
}

KNNEXT_INLINE float min_row(const float* x, int64_t n) {
  VecF lowest = splat(kInf);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecF v = load(x + i);
    lowest = v < lowest ? v : lowest;
  }
  if (i < n) {
    const VecF v = load_tail(x + i, n - i, kInf);
    lowest = v < lowest ? v : lowest;
  }
  return -max_lane(-lowest);
}

// This loop and the next are left to the compiler: it vectorises them as long as every load is
// unconditional and no float is reduced.
template <class Token>
Survey<float> clean(const float* distances, const Token* tokens, int64_t k, float* out) {
  Token lowest = 0, highest = -1;
  int32_t nans = 0;
  for (int64_t i = 0; i < k; ++i) {
    const Token token = tokens[i];
    const float given = distances[i];
    const float d = token < 0 ? kInf : given;
    lowest = token < lowest ? token : lowest;
    highest = token > highest ? token : highest;
    nans |= d != d;
    out[i] = d;
  }
  return {min_row(out, k), nans != 0, lowest, highest};
}

template <class Token>
float match(const float* distances, const Token* tokens, int64_t target, int64_t k, float* out) {
  if (static_cast<Token>(target) != target) return kInf;  // no int32 token can have it
  const Token wanted = static_cast<Token>(target);
  for (int64_t i = 0; i < k; ++i) {
    const float d = distances[i];
    out[i] = tokens[i] == wanted ? d : kInf;
  }
  return min_row(out, k);
}

double sum_exp(const float* distances, int64_t k, float nearest, float temperature) {
  const VecF shift = splat(nearest), t = splat(temperature);
  return sum_row(distances, k, kInf, [=](VecF d) { return exp_of((shift - d) / t); });
}

void exp_row(float* x, int64_t n) {
  map_row(x, n, [](VecF v) { return exp_of(v); });
}

void log_row(float* x, int64_t n) {
  map_row(x, n, [](VecF v) { return log_of(v); });
}

void log_add_exp_row(float* a, const float* b, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(a + i, log_add_exp_of(load(a + i), load(b + i)));
  if (i == n) return;
  const VecF sum = log_add_exp_of(load_tail(a + i, n - i, 0.0f), load_tail(b + i, n - i, 0.0f));
  store_tail(a + i, sum, n - i);
}

// One pass over memory: the second look at a block finds it in the first cache.
template <class L>
MaxSum<float> max_sum(const void* logits, int64_t n) {
  const L* x = static_cast<const L*>(logits);
  float max = -kInf;
  double sum = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = start + kBlock < n ? kBlock : n - start;
    const float block_max = max_row(x + start, size);
    if (block_max > max) {
      sum *= __builtin_exp(static_cast<double>(max) - block_max);
      max = block_max;
    }
    const VecF shift = splat(max == -kInf ? 0.0f : max);  // a NaN among -inf must still be seen
    sum += sum_row(x + start, size, -kInf, [=](VecF v) { return exp_of(v - shift); });
  }
  return {max, sum};
}

template <class L>
void shift(const void* logits, int64_t n, float max, float offset, float* out) {
  const L* x = static_cast<const L*>(logits);
  const VecF m = splat(max), o = splat(offset);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, (load(x + i) - m) - o);
  if (i < n) store_tail(out + i, (load_tail(x + i, n - i, 0.0f) - m) - o, n - i);
}

}  // namespace
}  // namespace knnext::cpu

#include "cpu/vector/row_loops_gradient.h"

namespace knnext::cpu {
namespace {

constexpr RowLoops<float> kLoopsOfThisPath = {
    clean<int32_t>,
    clean<int64_t>,
    match<int32_t>,
    match<int64_t>,
    sum_exp,
    exp_row,
    log_row,
    log_add_exp_row,
    {max_sum<F16>, max_sum<BF16>, max_sum<float>, max_sum<double>},
    {shift<F16>, shift<BF16>, shift<float>, shift<double>},
    {grad_sums<F16>, grad_sums<BF16>, grad_sums<float>, grad_sums<double>},
    {logit_gradient<F16>, logit_gradient<BF16>, logit_gradient<float>, logit_gradient<double>},
    {gather<F16>, gather<BF16>, gather<float>, gather<double>},
    {scatter<F16>, scatter<BF16>, scatter<float>, scatter<double>},
};

}  // namespace
}  // namespace knnext::cpu
