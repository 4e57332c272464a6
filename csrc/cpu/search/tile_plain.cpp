// The search's inner loops for any processor: GCC's vector extension at 128 bits, which every
// 64-bit target maps to its own registers (SSE2, NEON). 4 queries x 8 keys in 8 of 16 registers.
#include "cpu/search/tile.h"

namespace knnext::cpu {
namespace {

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, fraction = half & 0x3ff;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | fraction << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else {
    // Subnormal: fraction / 2^24, which float32 holds exactly.
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct V {
  typedef float Type __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static constexpr int kSweepRows = 2;

  static Type zero() { return Type{}; }
  static Type broadcast(float x) { return Type{x, x, x, x}; }
  static Type load(const float* from) {
    Type x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  static void store(float* to, Type x) { std::memcpy(to, &x, sizeof x); }
  static Type add(Type a, Type b) { return a + b; }
  static Type subtract(Type a, Type b) { return a - b; }
  static Type multiply_add(Type a, Type b, Type c) { return a * b + c; }
  static Type max(Type a, Type b) { return a > b ? a : b; }
  static unsigned less(Type a, Type b) {
    const auto smaller = a < b;
    return (smaller[0] & 1) | (smaller[1] & 2) | (smaller[2] & 4) | (smaller[3] & 8);
  }
  static float sum(Type x) { return (x[0] + x[2]) + (x[1] + x[3]); }

  static Type widen(const float* from) { return load(from); }
  static Type widen(const Half* from) {
    return Type{half_to_float(from[0].bits), half_to_float(from[1].bits),
                half_to_float(from[2].bits), half_to_float(from[3].bits)};
  }
  static Type widen(const BFloat16* from) {
    float x[4];
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
      std::memcpy(x + i, &bits, 4);
    }
    return load(x);
  }

  template <class E>
  static Type widen_part(const E* from, int64_t n) {
    return widen_copy<V>(from, n);
  }

  static void transpose(Type (&r)[4]) {
    const Type a = r[0], b = r[1], c = r[2], d = r[3];
    for (int i = 0; i < 4; ++i) r[i] = Type{a[i], b[i], c[i], d[i]};
  }

  static void append(QueryList& list, Type distance, unsigned passing, uint32_t first) {
    append_lanes<V>(list, distance, passing, first);
  }
};

}  // namespace

const SearchKernels kPlainKernels = make_kernels<V, 4, 8>();

const SearchKernels& search_kernels() {
#if defined(__x86_64__)
  if (float_isa() == Isa::kAvx512) return kAvx512Kernels;
  if (float_isa() == Isa::kAvx2) return kAvx2Kernels;
#elif defined(__aarch64__)
  if (float_isa() == Isa::kNeon) return kNeonKernels;
#endif
  return kPlainKernels;
}

}  // namespace knnext::cpu
