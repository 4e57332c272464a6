// The search's inner loops with AVX2, FMA and F16C: 6 queries x 16 keys in 12 of the 16 registers.
#if defined(__AVX2__)
#include <immintrin.h>

#include "cpu/search/tile.h"

namespace knnext::cpu {
namespace {

struct V {
  using Type = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kSweepRows = 3;

  static Type zero() { return _mm256_setzero_ps(); }
  static Type broadcast(float x) { return _mm256_set1_ps(x); }
  static Type load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Type x) { _mm256_storeu_ps(to, x); }
  static Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
  static Type subtract(Type a, Type b) { return _mm256_sub_ps(a, b); }
  static Type multiply_add(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  static Type max(Type a, Type b) { return _mm256_max_ps(a, b); }
  static unsigned less(Type a, Type b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
  }
  static float sum(Type x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  static Type widen(const float* from) { return load(from); }
  static Type widen(const Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Type widen(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  template <class E>
  static Type widen_part(const E* from, int64_t n) {
    return widen_copy<V>(from, n);
  }

  static void transpose(Type (&r)[8]) {
    Type t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    // After this, 128-bit lane l of r[4 i + j] holds column 4 l + j of rows 4 i .. 4 i + 3.
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
      t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }

  static void append(QueryList& list, Type distance, unsigned passing, uint32_t first) {
    append_lanes<V>(list, distance, passing, first);
  }
};

}  // namespace

const SearchKernels kAvx2Kernels = make_kernels<V, 6, 16>();

}  // namespace knnext::cpu
#endif
