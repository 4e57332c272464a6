// Sixteen lanes for the search by codes. Included only by files that are compiled for AVX-512.
#pragma once

// gcc 12 warns about its own intrinsics' undefined pass-through operands (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "cpu/codes/loops.h"

namespace knnext::cpu {
namespace {

struct Avx512 {
  using Float = __m512;
  using Word = __m512i;
  static constexpr int kWidth = 16;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float broadcast(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Float x) { _mm512_storeu_ps(to, x); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float sqrt(Float x) { return _mm512_sqrt_ps(x); }
  static unsigned less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Float to_float(Word x) { return _mm512_cvtepi32_ps(x); }

  static Word load_words(const uint32_t* from) { return _mm512_loadu_si512(from); }
  static void store_words(uint32_t* to, Word x) { _mm512_storeu_si512(to, x); }
  static Word broadcast_word(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }

  static int32_t total(Word x) { return _mm512_reduce_add_epi32(x); }

  static void transpose(Word (&r)[16]) {
    Word t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    // After this, 128-bit lane l of r[4 i + j] holds column 4 l + j of rows 4 i .. 4 i + 3.
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
      const Word even_top = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
      const Word odd_top = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
      const Word even_bottom = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
      const Word odd_bottom = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
      t[j] = _mm512_shuffle_i32x4(even_top, even_bottom, 0x88);
      t[4 + j] = _mm512_shuffle_i32x4(odd_top, odd_bottom, 0x88);
      t[8 + j] = _mm512_shuffle_i32x4(even_top, even_bottom, 0xdd);
      t[12 + j] = _mm512_shuffle_i32x4(odd_top, odd_bottom, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }

  static void append(QueryList& list, Float distance, unsigned passing, uint32_t first) {
    append_code_lanes<Avx512>(list, distance, passing, first);
  }
};

}  // namespace
}  // namespace knnext::cpu
