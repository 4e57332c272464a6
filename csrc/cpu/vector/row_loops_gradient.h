// The float32 row loops of the gradients, compiled once for each vector path like those of
// row_loops_float.h, which includes this.
#pragma once

#include "cpu/vector/math.h"
#include "cpu/vector/row_loops.h"

namespace knnext::cpu {
namespace {

template <class L>
GradSums grad_sums(const void* logits, const float* grad, int64_t n) {
  const L* x = static_cast<const L*>(logits);
  GradSums total{0, 0};
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = start + kBlock < n ? start + kBlock : n;
    VecF all[2] = {}, live[2] = {};
    const auto add = [&](VecF logit, VecF g, int chain) {
      all[chain] += g;
      live[chain] += logit == splat(-kInf) ? VecF{} : g;
    };
    int64_t i = start;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes)
      for (int j = 0; j < 2; ++j) add(load(x + i + j * kLanes), load(grad + i + j * kLanes), j);
    for (; i < end; i += kLanes) {
      const int64_t left = end - i < kLanes ? end - i : kLanes;
      add(load_tail(x + i, left, 0.0f), load_tail(grad + i, left, 0.0f), 0);
    }
    total.all += sum_lanes(all[0] + all[1]);
    total.live += sum_lanes(live[0] + live[1]);
  }
  return total;
}

template <class L>
void logit_gradient(const void* logits, const float* grad, int64_t n, float max, float keep,
                    float scale, void* out) {
  const L* x = static_cast<const L*>(logits);
  L* to = static_cast<L*>(out);
  const VecF m = splat(max), kept = splat(keep), s = splat(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(to + i, kept * load(grad + i) - s * exp_of(load(x + i) - m));
  if (i == n) return;
  L last[kLanes];
  const VecF exps = exp_of(load_tail(x + i, n - i, max) - m);
  store(last, kept * load_tail(grad + i, n - i, 0.0f) - s * exps);
  std::memcpy(to + i, last, (n - i) * sizeof(L));
}

template <class L>
void gather(const void* row, const int64_t* at, int64_t n, float* out) {
  const L* from = static_cast<const L*>(row);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    L elements[kLanes] = {};
    for (int64_t j = 0; j < left; ++j) elements[j] = from[at[i + j]];
    store_tail(out + i, load(elements), left);
  }
}

template <class L>
void scatter(const float* values, const int64_t* at, int64_t n, void* row) {
  L* to = static_cast<L*>(row);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    L elements[kLanes];
    store(elements, load_tail(values + i, left, 0.0f));
    for (int64_t j = 0; j < left; ++j) to[at[i + j]] = elements[j];
  }
}

// f(i, at most kLanes) over a row.
template <class F>
KNNEXT_INLINE void by_register(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, n - i);
}

template <class L>
KNNEXT_INLINE VecF load_some(const L* p, int64_t n) {
  return n == kLanes ? load(p) : load_tail(p, n, 0.0f);
}

template <class L>
KNNEXT_INLINE void store_some(L* p, VecF v, int64_t n) {
  if (n == kLanes) return store(p, v);
  L last[kLanes];
  store(last, v);
  std::memcpy(p, last, n * sizeof(L));
}

template <class L>
void widen(const void* row, int64_t n, float* out) {
  const L* x = static_cast<const L*>(row);
  by_register(n,
              [=](int64_t i, int64_t left) { store_some(out + i, load_some(x + i, left), left); });
}

template <class L>
void add_difference(const float* own, const void* other, int64_t n, float weight, float* sum) {
  const L* x = static_cast<const L*>(other);
  const VecF w = splat(weight);
  by_register(n, [=](int64_t i, int64_t left) {
    const VecF step = load_some(own + i, left) - load_some(x + i, left);
    store_some(sum + i, load_some(sum + i, left) + w * step, left);
  });
}

template <class L>
void add(const void* other, int64_t n, float weight, float* sum) {
  const L* x = static_cast<const L*>(other);
  const VecF w = splat(weight);
  by_register(n, [=](int64_t i, int64_t left) {
    store_some(sum + i, load_some(sum + i, left) + w * load_some(x + i, left), left);
  });
}

template <class L>
void narrow(const float* sum, int64_t n, void* out) {
  L* to = static_cast<L*>(out);
  by_register(n,
              [=](int64_t i, int64_t left) { store_some(to + i, load_some(sum + i, left), left); });
}

constexpr SumLoops kSumLoopsOfThisPath = {
    {widen<F16>, widen<BF16>, widen<float>},
    {add_difference<F16>, add_difference<BF16>, add_difference<float>},
    {add<F16>, add<BF16>, add<float>},
    {narrow<F16>, narrow<BF16>, narrow<float>},
};

}  // namespace
}  // namespace knnext::cpu
