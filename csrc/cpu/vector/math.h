// exp and log over a register of float32, written once for every vector path: the compiler's own
// vector types, as wide as the flags of the including file allow. Everything here has internal
// linkage, because each path needs its own copy (see isa.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(KNNEXT_NEON_PATH)
#include <arm_neon.h>
#endif

namespace knnext::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));

// As they lie in memory. torch's own types are left out here: their inline functions are shared.
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

constexpr float kInf = std::numeric_limits<float>::infinity();

#define KNNEXT_INLINE static inline __attribute__((always_inline))

KNNEXT_INLINE VecF splat(float x) {
  return x - VecF{};
}

KNNEXT_INLINE VecI splat(int32_t x) {
  return x - VecI{};
}

template <class To, class From>
KNNEXT_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

KNNEXT_INLINE VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

KNNEXT_INLINE VecF load(const double* p) {
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}

KNNEXT_INLINE VecF load(const BF16* p) {
  VecH h;
  std::memcpy(&h, p, sizeof h);
  return bits_as<VecF>(__builtin_convertvector(h, VecI) << 16);
}

KNNEXT_INLINE VecF load(const F16* p) {
#if defined(__AVX512F__)
  return bits_as<VecF>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bits_as<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(KNNEXT_NEON_PATH)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  VecH packed;
  std::memcpy(&packed, p, sizeof packed);
  const VecI h = __builtin_convertvector(packed, VecI);
  const VecI magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
  const VecI exponent = h & 0x7c00;
  // A subnormal half is read as 2^-14 (1 + f) and loses the 2^-14 again: no float32 subnormals on
  // the way, which the process may have set to be flushed.
  const VecI rebiased = magnitude + (112 << 23);
  const VecF subnormal = bits_as<VecF>(rebiased + (1 << 23)) - 0x1p-14f;
  VecI out = exponent == 0x7c00 ? (magnitude | 0x7f800000) : rebiased;
  out = exponent == 0 ? bits_as<VecI>(subnormal) : out;
  return bits_as<VecF>(out | sign);
#endif
}

KNNEXT_INLINE void store(float* p, VecF v) {
  std::memcpy(p, &v, sizeof v);
}

KNNEXT_INLINE void store(double* p, VecF v) {
  for (int i = 0; i < kLanes; ++i) p[i] = v[i];
}

KNNEXT_INLINE void store(BF16* p, VecF v) {
  const VecI bits = bits_as<VecI>(v);
  // To the nearest, ties to even. What a NaN has in its low bits must not carry into its exponent.
  const VecI rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const VecI kept = v == v ? rounded : (bits | 0x400000);
  const VecH out = __builtin_convertvector(kept >> 16, VecH);
  std::memcpy(p, &out, sizeof out);
}

KNNEXT_INLINE void store(F16* p, VecF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(KNNEXT_NEON_PATH)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)));
#else
  const VecI magnitude = bits_as<VecI>(v) & 0x7fffffff, sign = (bits_as<VecI>(v) >> 16) & 0x8000;
  const VecI normal = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112 << 10);
  // An ulp of 0.5 is the step of subnormal halves: the sum is rounded where they are.
  const VecI subnormal = bits_as<VecI>(bits_as<VecF>(magnitude) + 0.5f) - 0x3f000000;
  VecI out = magnitude < 0x38800000 ? subnormal : normal;
  out = out > 0x7c00 ? splat(0x7c00) : out;
  out = magnitude > 0x7f800000 ? splat(0x7e00) : out;
  const VecH packed = __builtin_convertvector(out | sign, VecH);
  std::memcpy(p, &packed, sizeof packed);
#endif
}

KNNEXT_INLINE VecF max_of(VecF a, VecF b) {
  return a > b ? a : b;
}  // b where a is NaN

// e^x for x <= 88, to 1 ulp; 0 below the smallest normal (x < -87.3); NaN stays NaN.
KNNEXT_INLINE VecF exp_of(VecF x) {
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF shifted = x * 1.44269504f + magic;
  const VecF n = shifted - magic;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  VecF q = r * 1.381461318e-3f + 8.368709928e-3f;              // minimax on |r| <= ln(2) / 2
  q = q * r + 4.166838737e-2f;
  q = q * r + 1.666652069e-1f;
  q = q * r + 4.999999345e-1f;
  const VecF power = bits_as<VecF>((bits_as<VecI>(shifted) << 23) + 0x3f800000);
  const VecF result = (q * (r * r) + r + 1.0f) * power;
  return x < -87.33654f ? VecF{} : result;
}

// ln x for positive normal x, to 2 ulp; exact 0 at 1.
KNNEXT_INLINE VecF log_of(VecF x) {
  const VecI exponent = (bits_as<VecI>(x) - 0x3f3504f3) >> 23;  // of x / sqrt(1/2)
  const VecF f = bits_as<VecF>(bits_as<VecI>(x) - (exponent << 23)) - 1.0f;
  const VecF n = __builtin_convertvector(exponent, VecF);
  VecF q = f * -7.634499988e-2f + 1.276158245e-1f;  // minimax on sqrt(1/2) <= 1 + f < sqrt(2)
  q = q * f - 1.316018367e-1f;
  q = q * f + 1.420175737e-1f;
  q = q * f - 1.662335716e-1f;
  q = q * f + 2.000122690e-1f;
  q = q * f - 2.500082104e-1f;
  q = q * f + 3.333333171e-1f;
  const VecF squared = f * f;
  const VecF tail = q * (squared * f) - n * 2.12194440e-4f - 0.5f * squared;
  return (f + tail) + n * 0.693359375f;
}

// ln(1 + x) for 0 <= x <= 1: the log of the rounded 1 + x, and what the rounding lost.
KNNEXT_INLINE VecF log1p_of(VecF x) {
  const VecF u = x + 1.0f;
  return log_of(u) + (x - (u - 1.0f)) / u;
}

KNNEXT_INLINE VecF log_add_exp_of(VecF a, VecF b) {
  const VecF high = a > b ? a : b;
  const VecF low = a > b ? b : a;
  const VecF sum = high + log1p_of(exp_of(low - high));
  return high == splat(-kInf) ? high : sum;  // both -inf: their difference is NaN
}

}  // namespace
}  // namespace knnext::cpu
