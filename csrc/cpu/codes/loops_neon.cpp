// The search by codes with NEON: 16-bit codes in pairs, 8 queries x 12 keys.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "cpu/codes/loops.h"

namespace knnext::cpu {
namespace {

struct V {
  using Float = float32x4_t;
  using Word = int32x4_t;
  static constexpr int kWidth = 4, kWordCodes = 2, kShift = 0;

  static Float zero() { return vdupq_n_f32(0.0f); }
  static Float broadcast(float x) { return vdupq_n_f32(x); }
  static Float load(const float* from) { return vld1q_f32(from); }
  static void store(float* to, Float x) { vst1q_f32(to, x); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  // vmaxq_f32 gives NaN where either is.
  static Float max(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Float sqrt(Float x) { return vsqrtq_f32(x); }
  static unsigned less(Float a, Float b) {
    const uint32x4_t lanes = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcltq_f32(a, b), lanes));
  }
  static Float to_float(Word x) { return vcvtq_f32_s32(x); }

  static Word load_words(const uint32_t* from) { return vreinterpretq_s32_u32(vld1q_u32(from)); }
  static void store_words(uint32_t* to, Word x) { vst1q_u32(to, vreinterpretq_u32_s32(x)); }
  static Word broadcast_word(uint32_t x) { return vdupq_n_s32(static_cast<int32_t>(x)); }
  static Word dot(Word sum, Word keys, Word queries) {
    const int16x8_t x = vreinterpretq_s16_s32(keys), q = vreinterpretq_s16_s32(queries);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(q));
    return vaddq_s32(sum, vpaddq_s32(low, vmull_high_s16(x, q)));
  }
  static Word key_words(const int8_t* from) {
    return vreinterpretq_s32_s16(vmovl_s8(vld1_s8(from)));
  }

  static int32_t total(Word x) { return vaddvq_s32(x); }

  static void transpose(Word (&r)[4]) {
    const int64x2_t a = vreinterpretq_s64_s32(vtrn1q_s32(r[0], r[1]));
    const int64x2_t b = vreinterpretq_s64_s32(vtrn2q_s32(r[0], r[1]));
    const int64x2_t c = vreinterpretq_s64_s32(vtrn1q_s32(r[2], r[3]));
    const int64x2_t d = vreinterpretq_s64_s32(vtrn2q_s32(r[2], r[3]));
    r[0] = vreinterpretq_s32_s64(vtrn1q_s64(a, c));
    r[1] = vreinterpretq_s32_s64(vtrn1q_s64(b, d));
    r[2] = vreinterpretq_s32_s64(vtrn2q_s64(a, c));
    r[3] = vreinterpretq_s32_s64(vtrn2q_s64(b, d));
  }

  static void append(QueryList& list, Float distance, unsigned passing, uint32_t first) {
    append_code_lanes<V>(list, distance, passing, first);
  }
};

}  // namespace

const CodeKernels kNeonCodeKernels = make_code_kernels<V, 8, 12>();

}  // namespace knnext::cpu
#endif
