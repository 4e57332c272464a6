// The search by codes with AVX2: 16-bit codes in pairs, 6 queries x 16 keys in 12 of the 16
// registers. (Bytes, unsigned times signed, would overflow the 16 bits of a pair's sum.)
#if defined(__AVX2__)
#include "cpu/codes/vector_avx2.h"

namespace knnext::cpu {
namespace {

struct V : Avx2 {
  static constexpr int kWordCodes = 2, kShift = 0;

  static Word dot(Word sum, Word keys, Word queries) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(keys, queries));
    KNNEXT_IN_PLACE(sum);
    return sum;
  }
  static Word key_words(const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
};

}  // namespace

const CodeKernels kAvx2CodeKernels = make_code_kernels<V, 6, 16>();

}  // namespace knnext::cpu
#endif
