#if defined(__x86_64__)
#include "cpu/vector/row_loops_float.h"

namespace knnext::cpu {
extern const RowLoops<float> kRowLoopsAvx512 = kLoopsOfThisPath;
extern const SumLoops kSumLoopsAvx512 = kSumLoopsOfThisPath;
}  // namespace knnext::cpu
#endif
