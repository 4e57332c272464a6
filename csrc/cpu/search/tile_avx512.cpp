// The search's inner loops with AVX-512: 8 queries x 48 keys in 24 of the 32 registers.
#if defined(__AVX512F__)
// gcc 12 warns about its own intrinsics' undefined pass-through operands (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "cpu/search/tile.h"

namespace knnext::cpu {
namespace {

struct V {
  using Type = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kSweepRows = 4;

  static Type zero() { return _mm512_setzero_ps(); }
  static Type broadcast(float x) { return _mm512_set1_ps(x); }
  static Type load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Type x) { _mm512_storeu_ps(to, x); }
  static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  static Type subtract(Type a, Type b) { return _mm512_sub_ps(a, b); }
  static Type multiply_add(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  static Type max(Type a, Type b) { return _mm512_max_ps(a, b); }
  static unsigned less(Type a, Type b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static float sum(Type x) { return _mm512_reduce_add_ps(x); }

  static Type widen(const float* from) { return load(from); }
  static Type widen(const Half* from) {
    return widen_half(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Type widen(const BFloat16* from) {
    return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Type widen_part(const float* from, int64_t n) {
    return _mm512_maskz_loadu_ps(first_lanes(n), from);
  }
  static Type widen_part(const Half* from, int64_t n) {
    return widen_half(_mm256_maskz_loadu_epi16(first_lanes(n), from));
  }
  static Type widen_part(const BFloat16* from, int64_t n) {
    return widen_bfloat16(_mm256_maskz_loadu_epi16(first_lanes(n), from));
  }

  static void transpose(Type (&r)[16]) {
    Type t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    // After this, 128-bit lane l of r[4 i + j] holds column 4 l + j of rows 4 i .. 4 i + 3.
    for (int i = 0; i < 16; i += 4) {
      r[i] = unpack_low(t[i], t[i + 2]);
      r[i + 1] = unpack_high(t[i], t[i + 2]);
      r[i + 2] = unpack_low(t[i + 1], t[i + 3]);
      r[i + 3] = unpack_high(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
      const Type even_top = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
      const Type odd_top = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
      const Type even_bottom = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
      const Type odd_bottom = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
      t[j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0x88);
      t[4 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88);
      t[8 + j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd);
      t[12 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }

  // Lists have room for whole vectors past the last entry.
  static void append(QueryList& list, Type distance, unsigned passing, uint32_t first) {
    const __m512i bits = _mm512_castps_si512(distance);
    const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    const __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign);
    const __m512i ordered = _mm512_xor_si512(bits, flip);
    append_half(list, _mm512_castsi512_si256(ordered), passing & 0xff, first);
    append_half(list, _mm512_extracti64x4_epi64(ordered, 1), passing >> 8, first + 8);
  }

 private:
  static __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Type widen_half(__m256i bits) { return _mm512_cvtph_ps(bits); }
  static Type widen_bfloat16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Type unpack_low(Type a, Type b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static Type unpack_high(Type a, Type b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static void append_half(QueryList& list, __m256i ordered, unsigned passing, uint32_t first) {
    const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i rows = _mm512_add_epi64(_mm512_set1_epi64(first), lanes);
    const __m512i high = _mm512_slli_epi64(_mm512_cvtepu32_epi64(ordered), 32);
    const __m512i chosen = _mm512_maskz_compress_epi64(passing, _mm512_or_si512(high, rows));
    _mm512_storeu_si512(list.entries + list.size, chosen);
    list.size += __builtin_popcount(passing);
  }
};

}  // namespace

const SearchKernels kAvx512Kernels = make_kernels<V, 8, 48>();

}  // namespace knnext::cpu
#endif
