// The inner loops of the search by codes, written once over a vector type V, as search/tile.h is.
// V gives:
//
//   Float, Word: vectors of kWidth floats and of as many 32-bit words
//   kWordCodes: codes of a word, 4 or 2; kShift: what key codes are shifted by
//   zero, broadcast, load, store, add, multiply, multiply_add, max, sqrt of floats;
//   less(a, b) = bit mask of lanes; to_float(Word)
//   load_words, store_words, broadcast_word(uint32_t), dot(sum, keys, queries): the sum, plus the
//   products of the codes of each word; total(Word): of its lanes; key_words(const int8_t*): kWidth
//   words of key codes; transpose(Word (&)[kWidth]), append(list, distance, mask, first)
//
// Everything is in an unnamed namespace: each file needs its own copies.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/codes/bound.h"
#include "cpu/codes/kernels.h"
#include "cpu/search/candidates.h"

// Says that a sum of vectors stays in its register: gcc 12 would copy those of a tile to memory and
// back at every step.
#ifndef KNNEXT_IN_PLACE
#define KNNEXT_IN_PLACE(sum) asm("" : "+v"(sum))
#endif

namespace knnext::cpu {
namespace {

// Lanes of vectors of the compiler's own, as wide as the span allows.
template <int kLanes>
struct Lanes {
  typedef float Type __attribute__((vector_size(4 * kLanes)));
  static Type load(const float* from) {
    Type x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  static void store(float* to, Type x) { std::memcpy(to, &x, sizeof x); }
};

// Steps of `span` and 2 span at once: four runs of `span` elements, kLanes at a time.
template <int kLanes>
void two_steps(float* x, int64_t n, int64_t span) {
  using L = Lanes<kLanes>;
  for (int64_t start = 0; start < n; start += 4 * span)
    for (int64_t i = start; i < start + span; i += kLanes) {
      const auto a = L::load(x + i), b = L::load(x + i + span);
      const auto c = L::load(x + i + 2 * span), d = L::load(x + i + 3 * span);
      const auto ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
      L::store(x + i, ab + cd);
      L::store(x + i + span, a_b + c_d);
      L::store(x + i + 2 * span, ab - cd);
      L::store(x + i + 3 * span, a_b - c_d);
    }
}

template <int kLanes>
void one_step(float* x, int64_t n, int64_t span) {
  using L = Lanes<kLanes>;
  for (int64_t start = 0; start < n; start += 2 * span)
    for (int64_t i = start; i < start + span; i += kLanes) {
      const auto a = L::load(x + i), b = L::load(x + i + span);
      L::store(x + i, a + b);
      L::store(x + i + span, a - b);
    }
}

// Each step's sums are the same, however many steps are taken at once and lanes side by side.
template <int kMostLanes>
void hadamard(float* x, int64_t n) {
  int64_t span = 1;
  while (span < n) {
    const bool two = 4 * span <= n;
    if (span >= kMostLanes)
      two ? two_steps<kMostLanes>(x, n, span) : one_step<kMostLanes>(x, n, span);
    else if (span >= 4)
      two ? two_steps<4>(x, n, span) : one_step<4>(x, n, span);
    else
      two ? two_steps<1>(x, n, span) : one_step<1>(x, n, span);
    span *= two ? 4 : 2;
  }
}

// As search/tile.h packs keys: each line is asked for ahead, in the same row or the next panel's.
template <class V, int kKeys>
void pack_codes(const int8_t* rows, int64_t stride, int num_rows, int64_t dim, uint32_t* panel) {
  constexpr int64_t kLine = 64, kAhead = 4 * kLine;
  constexpr int kBlockCodes = V::kWidth * V::kWordCodes;  // of one row of a transposed block
  const int64_t words = (dim + V::kWordCodes - 1) / V::kWordCodes;
  for (int64_t word = 0; word < words; word += V::kWidth) {
    const int64_t d = word * V::kWordCodes;
    const int64_t held = dim - d < kBlockCodes ? dim - d : kBlockCodes;
    const int64_t count = words - word < V::kWidth ? words - word : V::kWidth;
    const int8_t* ahead =
        d + kAhead < dim ? rows + d + kAhead : rows + kKeys * stride + (d + kAhead) % dim;
    for (int group = 0; group < kKeys; group += V::kWidth) {
      if (d % kLine == 0)
        for (int i = 0; i < V::kWidth; ++i) __builtin_prefetch(ahead + (group + i) * stride);
      typename V::Word block[V::kWidth];
      for (int i = 0; i < V::kWidth; ++i) {
        int8_t padded[kBlockCodes];
        const int8_t* from = rows + (group + i) * stride + d;
        if (group + i >= num_rows || held < kBlockCodes) {
          std::memset(padded, 0, sizeof padded);
          if (group + i < num_rows) std::memcpy(padded, from, held);
          from = padded;
        }
        block[i] = V::key_words(from);
      }
      V::transpose(block);
      for (int64_t i = 0; i < count; ++i)
        V::store_words(panel + (word + i) * kKeys + group, block[i]);
    }
  }
}

template <class V, int kTileRows, int kKeys, int kRows>
void multiply_code_rows(const uint32_t* tile, const int32_t* start, const uint32_t* panel,
                        int64_t words, int32_t* products) {
  constexpr int kVectors = kKeys / V::kWidth;
  typename V::Word sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (auto& s : sum[i]) s = V::broadcast_word(static_cast<uint32_t>(start[i]));
  for (int64_t word = 0; word < words; ++word) {
    typename V::Word x[kVectors];
    for (int j = 0; j < kVectors; ++j) x[j] = V::load_words(panel + word * kKeys + j * V::kWidth);
    for (int i = 0; i < kRows; ++i) {
      const auto q = V::broadcast_word(tile[word * kTileRows + i]);
      for (int j = 0; j < kVectors; ++j) sum[i][j] = V::dot(sum[i][j], x[j], q);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j)
      V::store_words(reinterpret_cast<uint32_t*>(products) + i * kKeys + j * V::kWidth, sum[i][j]);
}

template <class V, int kTileRows, int kKeys, int kRows = kTileRows>
void multiply_codes(const uint32_t* tile, const int32_t* start, const uint32_t* panel,
                    int64_t words, int rows, int32_t* products) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return multiply_codes<V, kTileRows, kKeys, kRows - 1>(tile, start, panel, words, rows,
                                                            products);
  }
  multiply_code_rows<V, kTileRows, kKeys, kRows>(tile, start, panel, words, products);
}

template <class V, int kKeys, int kRows>
void multiply_few(const uint32_t* queries, int64_t query_words, const int32_t* start,
                  const int8_t* keys, int num_keys, int64_t dim, int32_t* products) {
  constexpr int kBlockCodes = V::kWidth * V::kWordCodes;
  for (int key = 0; key < num_keys; ++key) {
    const int8_t* row = keys + key * dim;
    typename V::Word sum[kRows];
    for (auto& s : sum) s = V::broadcast_word(0);
    const uint32_t* words = queries;
    for (int64_t d = 0; d < dim; d += kBlockCodes, words += V::kWidth) {
      const auto x = V::key_words(row + d);
      for (int i = 0; i < kRows; ++i)
        sum[i] = V::dot(sum[i], x, V::load_words(words + i * query_words));
    }
    for (int i = 0; i < kRows; ++i) products[i * kKeys + key] = start[i] + V::total(sum[i]);
  }
}

template <class V, int kKeys, int kRows = kFewCodeRows>
void multiply_few_codes(const uint32_t* queries, int64_t query_words, const int32_t* start,
                        const int8_t* keys, int num_keys, int64_t dim, int rows,
                        int32_t* products) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return multiply_few_codes<V, kKeys, kRows - 1>(queries, query_words, start, keys, num_keys,
                                                     dim, rows, products);
  }
  multiply_few<V, kKeys, kRows>(queries, query_words, start, keys, num_keys, dim, products);
}

// bound.h and bound.cpp say what is computed here, and why it errs to one side alone.
template <class V>
typename V::Float bound_l2(const CodedQuery& query, typename V::Float products,
                           typename V::Float errors, typename V::Float thirds) {
  constexpr float kLow = 1 - 0x1p-20f, kHigh = 1 + 0x1p-20f;
  const auto zero = V::zero();
  const auto norms = V::add(V::multiply_add(errors, errors, thirds), V::broadcast(query.sqnorm));
  const auto square = V::multiply_add(V::broadcast(query.product), products, norms);
  const auto root = V::multiply(V::sqrt(V::max(square, zero)), V::broadcast(kLow));
  const auto error = V::multiply(V::add(errors, V::broadcast(query.error)), V::broadcast(-kHigh));
  const auto apart = V::max(V::add(root, error), zero);
  const auto share = V::broadcast(query.share * kLow);
  const auto distance = V::multiply(V::multiply(apart, apart), share);
  return V::max(V::add(distance, V::broadcast(-query.slack)), zero);
}

template <class V, Metric kMetric>
void filter_vector(const CodeTile& tile, const CodedQuery& query, const int32_t* products, int key,
                   QueryList& list) {
  const auto errors = V::load(tile.keys.errors + key), thirds = V::load(tile.keys.thirds + key);
  const auto scaled =
      V::multiply(V::to_float(V::load_words(reinterpret_cast<const uint32_t*>(products) + key)),
                  V::load(tile.keys.scales + key));
  const auto of_key =
      V::multiply_add(V::broadcast(query.by_third), thirds, V::broadcast(query.base));
  const auto with_error = V::multiply_add(V::broadcast(query.by_error), errors, of_key);
  auto bound = V::multiply_add(V::broadcast(query.product), scaled, with_error);
  unsigned passing;
  if constexpr (kMetric == Metric::kL2) {
    // Without a threshold there is nothing to test, but whether there is a key at all.
    passing = list.threshold < __builtin_inff() ? V::less(bound, V::zero())
                                                : V::less(thirds, V::broadcast(__builtin_inff()));
    if (!passing) return;
    bound = bound_l2<V>(query, scaled, errors, thirds);
    passing &= V::less(bound, V::broadcast(list.threshold));
  } else {
    passing = V::less(bound, V::broadcast(list.threshold));
    bound = V::max(bound, V::broadcast(-0x1.fffffep127f));  // no finite distance is less
  }
  if (passing) V::append(list, bound, passing, tile.first_key + key);
}

template <class V, Metric kMetric, int kKeys>
void filter_codes(const CodeTile& tile, const CodedForm& form, const Selection& selection,
                  CodedQuery* queries, QueryList* lists) {
  for (int i = 0; i < tile.rows; ++i) {
    if (!serves(queries[i], tile.keys.reach))
      form.tighten(queries[i], lists[i].threshold, tile.keys.reach);
    for (int key = 0; key < kKeys; key += V::kWidth)
      filter_vector<V, kMetric>(tile, queries[i], tile.products + i * kKeys, key, lists[i]);
    if (lists[i].size > selection.capacity) {
      keep_best(lists[i], selection.k);
      form.tighten(queries[i], lists[i].threshold, tile.keys.reach);
    }
  }
}

template <class V>
void append_code_lanes(QueryList& list, typename V::Float distance, unsigned passing,
                       uint32_t first) {
  float lanes[V::kWidth];
  V::store(lanes, distance);
  for (; passing; passing &= passing - 1) {
    const int lane = __builtin_ctz(passing);
    list.entries[list.size++] = pack_candidate(lanes[lane], first + lane);
  }
}

template <class V, int kTileRows, int kKeys>
constexpr CodeKernels make_code_kernels() {
  static_assert(kTileRows <= kMaxTileRows && kKeys <= kMaxPanelKeys && kKeys % V::kWidth == 0);
  return {kTileRows,
          kKeys,
          V::kWordCodes,
          V::kShift,
          V::kWidth * V::kWordCodes,
          hadamard<V::kWidth>,
          pack_codes<V, kKeys>,
          multiply_codes<V, kTileRows, kKeys>,
          multiply_few_codes<V, kKeys>,
          {filter_codes<V, Metric::kL2, kKeys>, filter_codes<V, Metric::kIp, kKeys>}};
}

}  // namespace
}  // namespace knnext::cpu
