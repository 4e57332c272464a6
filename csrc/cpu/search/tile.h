// The inner loops of the search, written once over a vector type V. Each vector path includes this
// file and instantiates it with its own V, which gives:
//
//   Type, kWidth, kSweepRows; zero, broadcast, load, store, add, multiply_add(a, b, c) = a b + c,
//   max(a, b) = b where either is NaN, less(a, b) = bit mask of lanes, sum(v),
//   widen(const E*) and widen_part(const E*, n < kWidth) for Half, BFloat16 and float,
//   transpose(Type (&)[kWidth]).
//
// Everything is in an unnamed namespace: each file needs its own copies.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/search/candidates.h"
#include "cpu/search/kernels.h"

namespace knnext::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The first n < kWidth elements, then zeros; for a V without masked loads.
template <class V, class E>
typename V::Type widen_copy(const E* from, int64_t n) {
  E padded[V::kWidth];
  std::memset(padded, 0, sizeof padded);
  std::memcpy(padded, from, n * sizeof(E));
  return V::widen(padded);
}

template <class V, class E>
typename V::Type widen_some(const E* from, int64_t n) {
  return n >= V::kWidth ? V::widen(from) : V::widen_part(from, n);
}

// Rows are read a cache line of each after the other, since lines of rows that lie a power of two
// apart drive each other out; and the processor does not see so many rows coming, so they are asked
// for ahead: further on in the same row, or in the next panel's.
template <class V, class E, int kKeys>
void pack(const void* rows, int64_t row_stride, int num_rows, int64_t dims, float* panel) {
  constexpr int64_t kLine = 64 / sizeof(E), kAhead = 4 * kLine;
  const E* from = static_cast<const E*>(rows);
  for (int64_t line = 0; line < dims; line += kLine) {
    const int64_t stop = dims - line < kLine ? dims : line + kLine;
    const E* ahead = line + kAhead < dims ? from + line + kAhead
                                          : from + kKeys * row_stride + (line + kAhead) % dims;
    for (int group = 0; group < kKeys; group += V::kWidth) {
      for (int i = 0; i < V::kWidth; ++i) __builtin_prefetch(ahead + (group + i) * row_stride);
      for (int64_t d = line; d < stop; d += V::kWidth) {
        const int64_t n = dims - d < V::kWidth ? dims - d : V::kWidth;
        typename V::Type block[V::kWidth];
        for (int i = 0; i < V::kWidth; ++i) {
          const int row = group + i;
          block[i] = row < num_rows ? widen_some<V, E>(from + row * row_stride + d, n) : V::zero();
        }
        V::transpose(block);
        for (int64_t i = 0; i < n; ++i) V::store(panel + (d + i) * kKeys + group, block[i]);
      }
    }
  }
}

template <class V, int kKeys>
void sqnorms(const float* panel, int64_t dims, float* sums) {
  constexpr int kVectors = kKeys / V::kWidth;
  for (int64_t start = 0; start == 0 || start < dims; start += kDimBlock) {
    const int64_t stop = start + kDimBlock < dims ? start + kDimBlock : dims;
    typename V::Type sum[kVectors];
    for (auto& s : sum) s = V::zero();
    for (int64_t d = start; d < stop; ++d)
      for (int j = 0; j < kVectors; ++j) {
        const auto x = V::load(panel + d * kKeys + j * V::kWidth);
        sum[j] = V::multiply_add(x, x, sum[j]);
      }
    for (int j = 0; j < kVectors; ++j) {
      float* to = sums + j * V::kWidth;
      V::store(to, start ? V::add(V::load(to), sum[j]) : sum[j]);
    }
  }
}

// One register tile: kRows x kVectors accumulators, over blocks of the dimension.
template <class V, int kTileRows, int kKeys, int kRows>
void multiply_rows(const float* tile, const float* panel, int64_t dims, float* products) {
  constexpr int kVectors = kKeys / V::kWidth;
  for (int64_t start = 0; start < dims; start += kDimBlock) {
    const int64_t stop = start + kDimBlock < dims ? start + kDimBlock : dims;
    typename V::Type sum[kRows][kVectors];
    for (auto& row : sum)
      for (auto& s : row) s = V::zero();
    for (int64_t d = start; d < stop; ++d) {
      typename V::Type x[kVectors];
      for (int j = 0; j < kVectors; ++j) x[j] = V::load(panel + d * kKeys + j * V::kWidth);
      for (int i = 0; i < kRows; ++i) {
        const auto q = V::broadcast(tile[d * kTileRows + i]);
        for (int j = 0; j < kVectors; ++j) sum[i][j] = V::multiply_add(q, x[j], sum[i][j]);
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) {
        float* to = products + i * kKeys + j * V::kWidth;
        V::store(to, start ? V::add(V::load(to), sum[i][j]) : sum[i][j]);
      }
  }
}

template <class V, int kTileRows, int kKeys, int kRows = kTileRows>
void multiply(const float* tile, const float* panel, int64_t dims, int rows, float* products) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return multiply<V, kTileRows, kKeys, kRows - 1>(tile, panel, dims, rows, products);
  }
  multiply_rows<V, kTileRows, kKeys, kRows>(tile, panel, dims, products);
}

// Distances of one query's row of the tile that lie below its threshold, appended in key order.
template <class V, int kKeys>
void filter_row(const Tile& tile, const float* products, QueryList& list) {
  const auto weight = V::broadcast(tile.product_weight), least = V::broadcast(tile.least);
  const auto query = V::broadcast(list.term), key_weight = V::broadcast(list.key_weight);
  const auto threshold = V::broadcast(list.threshold);
  for (int j = 0; j < kKeys; j += V::kWidth) {
    const auto terms = V::multiply_add(key_weight, V::load(tile.key_terms + j), query);
    const auto raw = V::multiply_add(weight, V::load(products + j), terms);
    const auto distance = tile.nan_is_least ? V::max(raw, least) : V::max(least, raw);
    unsigned passing = V::less(distance, threshold);
    if (!passing) continue;
    passing &= V::less(V::broadcast(-__builtin_inff()), distance);
    if (passing) V::append(list, distance, passing, tile.first_key + j);
  }
}

template <class V>
void append_lanes(QueryList& list, typename V::Type distance, unsigned passing, uint32_t first) {
  float lanes[V::kWidth];
  V::store(lanes, distance);
  for (; passing; passing &= passing - 1) {
    const int lane = __builtin_ctz(passing);
    list.entries[list.size++] = pack_candidate(lanes[lane], first + lane);
  }
}

template <class V, int kKeys>
void filter(const Tile& tile, const Selection& selection, QueryList* lists) {
  for (int i = 0; i < tile.rows; ++i) {
    filter_row<V, kKeys>(tile, tile.products + i * kKeys, lists[i]);
    if (lists[i].size > selection.capacity) keep_best(lists[i], selection.k);
  }
}

template <class V, class E>
void widen_row(const void* row, int64_t dims, float* out) {
  const E* from = static_cast<const E*>(row);
  int64_t d = 0;
  for (; d + V::kWidth <= dims; d += V::kWidth) V::store(out + d, V::widen(from + d));
  if (d == dims) return;
  float rest[V::kWidth];
  V::store(rest, V::widen_part(from + d, dims - d));
  std::memcpy(out + d, rest, (dims - d) * sizeof(float));
}

template <class V, bool kL2>
typename V::Type direct_step(typename V::Type q, typename V::Type x, typename V::Type sum) {
  if constexpr (!kL2) return V::multiply_add(q, x, sum);
  const auto difference = V::subtract(q, x);
  return V::multiply_add(difference, difference, sum);
}

template <class V, class E, bool kL2>
float direct(const float* query, const void* key, int64_t dims) {
  constexpr int kChains = 4;  // hides the latency of the additions
  const E* from = static_cast<const E*>(key);
  typename V::Type sum[kChains];
  for (auto& s : sum) s = V::zero();
  int64_t d = 0;
  for (; d + kChains * V::kWidth <= dims; d += kChains * V::kWidth)
    for (int c = 0; c < kChains; ++c) {
      const int64_t at = d + c * V::kWidth;
      sum[c] = direct_step<V, kL2>(V::load(query + at), V::widen(from + at), sum[c]);
    }
  for (; d < dims; d += V::kWidth) {
    const auto q = widen_some<V, float>(query + d, dims - d);
    sum[0] = direct_step<V, kL2>(q, widen_some<V, E>(from + d, dims - d), sum[0]);
  }
  const float total = V::sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
  return kL2 ? total : 0.0f - total;  // 0 - 0 is 0, and -(0) would be -0
}

// The scores of one key with kRows queries, kKeys apart; of the first of them also its norm, where
// products are wanted. A sum has the chains of direct(), so that a distance has its bits; a product
// takes two where more would leave no registers, which are still 16 parts or more.
template <class V, class E, SweepForm kForm, int kKeys, int kRows, bool kFirst>
void sweep_key(const E* key, int64_t dims, const float* queries, float* scores, float* sqnorm) {
  constexpr bool kProduct = kForm == SweepForm::kProduct, kNorm = kProduct && kFirst;
  constexpr int kChains = kProduct && kRows > 2 && V::kWidth >= 8 ? 2 : 4;
  constexpr int64_t kStep = kChains * V::kWidth, kAheadBytes = 2048;
  typename V::Type sum[kRows + kNorm][kChains];
  for (auto& chains : sum)
    for (auto& s : chains) s = V::zero();
  int64_t d = 0;
  for (; d + kStep <= dims; d += kStep) {
    // Keys follow each other in memory, but the processor looks no further than a page.
    if constexpr (kFirst)
      for (int64_t at = 0; at < kStep * static_cast<int64_t>(sizeof(E)); at += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(key + d) + kAheadBytes + at);
    for (int c = 0; c < kChains; ++c) {
      const int64_t at = d + c * V::kWidth;
      const auto x = V::widen(key + at);
      for (int i = 0; i < kRows; ++i)
        sum[i][c] = direct_step<V, kForm == SweepForm::kDirectL2>(V::load(queries + i * dims + at),
                                                                  x, sum[i][c]);
      if constexpr (kNorm) sum[kRows][c] = V::multiply_add(x, x, sum[kRows][c]);
    }
  }
  for (; d < dims; d += V::kWidth) {
    const auto x = widen_some<V, E>(key + d, dims - d);
    for (int i = 0; i < kRows; ++i)
      sum[i][0] = direct_step<V, kForm == SweepForm::kDirectL2>(
          widen_some<V, float>(queries + i * dims + d, dims - d), x, sum[i][0]);
    if constexpr (kNorm) sum[kRows][0] = V::multiply_add(x, x, sum[kRows][0]);
  }
  for (int i = 0; i < kRows + kNorm; ++i) {
    auto total = V::add(sum[i][0], sum[i][1]);
    if constexpr (kChains == 4) total = V::add(total, V::add(sum[i][2], sum[i][3]));
    const float score = V::sum(total);
    float* to = kNorm && i == kRows ? sqnorm : scores + i * kKeys;
    *to = kForm == SweepForm::kDirectIp ? 0.0f - score : score;
  }
}

template <class V, class E, SweepForm kForm, int kKeys, int kRows, bool kFirst>
void sweep_queries(const Sweep& sweep, int first) {
  if constexpr (kRows > 1) {
    if (sweep.num_queries - first < kRows)
      return sweep_queries<V, E, kForm, kKeys, kRows - 1, kFirst>(sweep, first);
  }
  const E* keys = static_cast<const E*>(sweep.keys);
  for (int i = 0; i < sweep.num_keys; ++i)
    sweep_key<V, E, kForm, kKeys, kRows, kFirst>(
        keys + i * sweep.row_stride, sweep.dims, sweep.queries + first * sweep.dims,
        sweep.scores + first * kKeys + i, sweep.sqnorms ? sweep.sqnorms + i : nullptr);
}

template <class V, class E, SweepForm kForm, int kKeys>
void sweep(const Sweep& sweep) {
  constexpr int kRows = V::kSweepRows;
  sweep_queries<V, E, kForm, kKeys, kRows, true>(sweep, 0);
  for (int first = kRows; first < sweep.num_queries; first += kRows)
    sweep_queries<V, E, kForm, kKeys, kRows, false>(sweep, first);
}

template <class V, int kTileRows, int kKeys>
constexpr SearchKernels make_kernels() {
  constexpr auto kL2 = SweepForm::kDirectL2, kIp = SweepForm::kDirectIp,
                 kProduct = SweepForm::kProduct;
  static_assert(kTileRows <= kMaxTileRows && kKeys <= kMaxPanelKeys && kKeys % V::kWidth == 0);
  return {
      kTileRows,
      kKeys,
      {pack<V, Half, kKeys>, pack<V, BFloat16, kKeys>, pack<V, float, kKeys>},
      sqnorms<V, kKeys>,
      multiply<V, kTileRows, kKeys>,
      filter<V, kKeys>,
      {widen_row<V, Half>, widen_row<V, BFloat16>, widen_row<V, float>},
      {direct<V, Half, true>, direct<V, BFloat16, true>, direct<V, float, true>},
      {direct<V, Half, false>, direct<V, BFloat16, false>, direct<V, float, false>},
      {{sweep<V, Half, kL2, kKeys>, sweep<V, BFloat16, kL2, kKeys>, sweep<V, float, kL2, kKeys>},
       {sweep<V, Half, kIp, kKeys>, sweep<V, BFloat16, kIp, kKeys>, sweep<V, float, kIp, kKeys>},
       {sweep<V, Half, kProduct, kKeys>, sweep<V, BFloat16, kProduct, kKeys>,
        sweep<V, float, kProduct, kKeys>}}};
}

}  // namespace
}  // namespace knnext::cpu
