// Eight lanes for the search by codes. Included only by files that are compiled for AVX2.
#pragma once

#include <immintrin.h>

#include "cpu/codes/loops.h"

namespace knnext::cpu {
namespace {

struct Avx2 {
  using Float = __m256;
  using Word = __m256i;
  static constexpr int kWidth = 8;

  static Float zero() { return _mm256_setzero_ps(); }
  static Float broadcast(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Float x) { _mm256_storeu_ps(to, x); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float sqrt(Float x) { return _mm256_sqrt_ps(x); }
  static unsigned less(Float a, Float b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
  }
  static Float to_float(Word x) { return _mm256_cvtepi32_ps(x); }

  static Word load_words(const uint32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void store_words(uint32_t* to, Word x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
  }
  static Word broadcast_word(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }

  static int32_t total(Word x) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }

  static void transpose(Word (&r)[8]) {
    Word t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    // After this, 128-bit lane l of r[4 i + j] holds column 4 l + j of rows 4 i .. 4 i + 3.
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
      t[j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x20);
      t[4 + j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }

  static void append(QueryList& list, Float distance, unsigned passing, uint32_t first) {
    append_code_lanes<Avx2>(list, distance, passing, first);
  }
};

}  // namespace
}  // namespace knnext::cpu
