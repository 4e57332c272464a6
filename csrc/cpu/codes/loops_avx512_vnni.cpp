// The search by codes with AVX-512 VNNI: bytes in fours, 8 queries x 48 keys in 24 of the 32
// registers.
#if defined(__AVX512F__)
#include "cpu/codes/vector_avx512.h"

namespace knnext::cpu {
namespace {

struct V : Avx512 {
  static constexpr int kWordCodes = 4, kShift = 128;

  static Word dot(Word sum, Word keys, Word queries) {
    sum = _mm512_dpbusd_epi32(sum, keys, queries);
    KNNEXT_IN_PLACE(sum);
    return sum;
  }
  static Word key_words(const int8_t* from) {
    return _mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
};

}  // namespace

const CodeKernels kAvx512VnniCodeKernels = make_code_kernels<V, 8, 48>();

}  // namespace knnext::cpu
#endif
