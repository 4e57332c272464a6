#if defined(__x86_64__)
#include "cpu/vector/row_loops_float.h"

namespace knnext::cpu {
extern const RowLoops<float> kRowLoopsAvx2 = kLoopsOfThisPath;
extern const SumLoops kSumLoopsAvx2 = kSumLoopsOfThisPath;
}  // namespace knnext::cpu
#endif
