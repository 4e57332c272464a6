// The search's inner loops with NEON: 8 queries x 12 keys in 24 of the 32 registers.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "cpu/search/tile.h"

namespace knnext::cpu {
namespace {

struct V {
  using Type = float32x4_t;
  static constexpr int kWidth = 4;
  static constexpr int kSweepRows = 4;

  static Type zero() { return vdupq_n_f32(0.0f); }
  static Type broadcast(float x) { return vdupq_n_f32(x); }
  static Type load(const float* from) { return vld1q_f32(from); }
  static void store(float* to, Type x) { vst1q_f32(to, x); }
  static Type add(Type a, Type b) { return vaddq_f32(a, b); }
  static Type subtract(Type a, Type b) { return vsubq_f32(a, b); }
  static Type multiply_add(Type a, Type b, Type c) { return vfmaq_f32(c, a, b); }
  // vmaxq_f32 gives NaN where either is.
  static Type max(Type a, Type b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static unsigned less(Type a, Type b) {
    const uint32x4_t lanes = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcltq_f32(a, b), lanes));
  }
  static float sum(Type x) {
    const float32x2_t pairs = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(pairs, 0) + vget_lane_f32(pairs, 1);
  }

  static Type widen(const float* from) { return load(from); }
  static Type widen(const Half* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)));
  }
  static Type widen(const BFloat16* from) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&from->bits), 16));
  }

  template <class E>
  static Type widen_part(const E* from, int64_t n) {
    return widen_copy<V>(from, n);
  }

  static void transpose(Type (&r)[4]) {
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1]));
    const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1]));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3]));
    const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
    r[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    r[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    r[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    r[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
  }

  static void append(QueryList& list, Type distance, unsigned passing, uint32_t first) {
    append_lanes<V>(list, distance, passing, first);
  }
};

}  // namespace

const SearchKernels kNeonKernels = make_kernels<V, 8, 12>();

}  // namespace knnext::cpu
#endif
