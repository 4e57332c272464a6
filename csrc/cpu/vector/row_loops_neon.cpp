#if defined(__aarch64__)
#define KNNEXT_NEON_PATH  // the compiler would use NEON anyway; this is for the half conversions
#include "cpu/vector/row_loops_float.h"

namespace knnext::cpu {
extern const RowLoops<float> kRowLoopsNeon = kLoopsOfThisPath;
extern const SumLoops kSumLoopsNeon = kSumLoopsOfThisPath;
}  // namespace knnext::cpu
#endif
