// key_sqnorms on the CPU: bit-equal to the norms that knn_search computes for itself.

#include "boxing.h"
#include "checks.h"
#include "cpu/parallel.h"
#include "cpu/search/key_rows.h"
#include "stable_compat.h"

namespace knnext::cpu {

Tensor key_sqnorms_cpu(const Tensor& keys) {
  check_key_sqnorms(keys);
  const KeyRows rows(keys);
  Tensor out = empty_on<1>(keys, {rows.num_rows()}, ScalarType::Float);
  float* to = out.mutable_data_ptr<float>();
  for_pieces(0, rows.num_rows(), 256, [&](int64_t begin, int64_t end) {
    row_sqnorms(rows, begin, end - begin, to + begin);
  });
  return out;
}

}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "key_sqnorms", knnext::cpu::key_sqnorms_cpu);
}
