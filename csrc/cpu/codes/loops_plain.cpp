// The search by codes for any processor: GCC's vector extension at 128 bits, 4 queries x 8 keys.
#include <cmath>

#if defined(__x86_64__)
#include <emmintrin.h>  // of every 64-bit x86
#endif

#include "cpu/codes/loops.h"

namespace knnext::cpu {
namespace {

struct V {
  typedef float Float __attribute__((vector_size(16)));
  typedef int32_t Word __attribute__((vector_size(16)));
  static constexpr int kWidth = 4, kWordCodes = 2, kShift = 0;

  static Float zero() { return Float{}; }
  static Float broadcast(float x) { return Float{x, x, x, x}; }
  static Float load(const float* from) {
    Float x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  static void store(float* to, Float x) { std::memcpy(to, &x, sizeof x); }
  static Float add(Float a, Float b) { return a + b; }
  static Float multiply(Float a, Float b) { return a * b; }
  static Float multiply_add(Float a, Float b, Float c) { return a * b + c; }
  static Float max(Float a, Float b) { return a > b ? a : b; }
  static Float sqrt(Float x) {
    return Float{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])};
  }
  static unsigned less(Float a, Float b) {
    const auto smaller = a < b;
    return (smaller[0] & 1) | (smaller[1] & 2) | (smaller[2] & 4) | (smaller[3] & 8);
  }
  static Float to_float(Word x) { return __builtin_convertvector(x, Float); }

  static Word load_words(const uint32_t* from) {
    Word x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  static void store_words(uint32_t* to, Word x) { std::memcpy(to, &x, sizeof x); }
  static Word broadcast_word(uint32_t word) {
    const int32_t x = static_cast<int32_t>(word);
    return Word{x, x, x, x};
  }
  static Word dot(Word sum, Word keys, Word queries) {
#if defined(__x86_64__)
    return sum + reinterpret_cast<Word>(_mm_madd_epi16(reinterpret_cast<__m128i>(keys),
                                                       reinterpret_cast<__m128i>(queries)));
#else
    return sum + (keys >> 16) * (queries >> 16) + low(keys) * low(queries);
#endif
  }
  static Word key_words(const int8_t* from) {
    int16_t codes[8];
    for (int i = 0; i < 8; ++i) codes[i] = from[i];
    Word x;
    std::memcpy(&x, codes, sizeof x);
    return x;
  }

  static int32_t total(Word x) { return (x[0] + x[2]) + (x[1] + x[3]); }

  static void transpose(Word (&r)[4]) {
    const Word a = r[0], b = r[1], c = r[2], d = r[3];
    for (int i = 0; i < 4; ++i) r[i] = Word{a[i], b[i], c[i], d[i]};
  }

  static void append(QueryList& list, Float distance, unsigned passing, uint32_t first) {
    append_code_lanes<V>(list, distance, passing, first);
  }

 private:
  [[maybe_unused]] static Word low(Word x) {  // the first of a pair, in little-endian order
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    return reinterpret_cast<Word>(reinterpret_cast<Unsigned>(x) << 16) >> 16;
  }
};

}  // namespace

const CodeKernels kPlainCodeKernels = make_code_kernels<V, 4, 8>();

const CodeKernels& code_kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Vnni:
      return kAvx512VnniCodeKernels;
    case Isa::kAvx512:
      return kAvx512CodeKernels;
    case Isa::kAvx2Vnni:
      return kAvx2VnniCodeKernels;
    case Isa::kAvx2:
      return kAvx2CodeKernels;
    default:
      return kPlainCodeKernels;
  }
#elif defined(__aarch64__)
  if (isa() == Isa::kNeon) return kNeonCodeKernels;
#endif
  return kPlainCodeKernels;
}

}  // namespace knnext::cpu
