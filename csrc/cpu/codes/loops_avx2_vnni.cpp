// The search by codes with AVX-VNNI: bytes in fours, 6 queries x 16 keys.
#if defined(__AVX2__)
#include "cpu/codes/vector_avx2.h"

namespace knnext::cpu {
namespace {

struct V : Avx2 {
  static constexpr int kWordCodes = 4, kShift = 128;

  static Word dot(Word sum, Word keys, Word queries) {
    sum = _mm256_dpbusd_avx_epi32(sum, keys, queries);
    KNNEXT_IN_PLACE(sum);
    return sum;
  }
  static Word key_words(const int8_t* from) {
    const Word codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
  }
};

}  // namespace

const CodeKernels kAvx2VnniCodeKernels = make_code_kernels<V, 6, 16>();

}  // namespace knnext::cpu
#endif
