// The search by codes with AVX-512 without VNNI: 16-bit codes in pairs, 8 queries x 48 keys in 24
// of the 32 registers.
#if defined(__AVX512F__)
#include "cpu/codes/vector_avx512.h"

namespace knnext::cpu {
namespace {

struct V : Avx512 {
  static constexpr int kWordCodes = 2, kShift = 0;

  static Word dot(Word sum, Word keys, Word queries) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(keys, queries));
    KNNEXT_IN_PLACE(sum);
    return sum;
  }
  static Word key_words(const int8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
};

}  // namespace

const CodeKernels kAvx512CodeKernels = make_code_kernels<V, 8, 48>();

}  // namespace knnext::cpu
#endif
