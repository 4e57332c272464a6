// encode_keys on the CPU.

#include <tuple>
#include <vector>

#include "boxing.h"
#include "checks.h"
#include "cpu/codes/encoder.h"
#include "cpu/parallel.h"
#include "cpu/search/key_rows.h"
#include "stable_compat.h"

namespace knnext::cpu {

std::tuple<Tensor, Tensor> encode_keys_cpu(const Tensor& keys, const Tensor& center) {
  check_encode_keys(keys, center);
  const KeyRows rows(keys);
  const Tensor origin = as_contiguous(center);
  const int64_t dim = rows.dim();
  Tensor codes = empty_on<2>(keys, {rows.num_rows(), dim}, ScalarType::Char);
  Tensor stats = empty_on<2>(keys, {rows.num_rows(), 3}, ScalarType::Float);
  auto* to_codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* to_stats = reinterpret_cast<CodeStats*>(stats.mutable_data_ptr<float>());
  const auto widen = search_kernels().widen[static_cast<int>(rows.element())];
  const Rotation rotation(dim);
  for_pieces(0, rows.num_rows(), 64, [&](int64_t begin, int64_t end) {
    Encoder encoder(rotation, origin.const_data_ptr<float>());
    std::vector<char> scratch;
    std::vector<float> row(dim);
    for (int64_t i = begin; i < end; ++i) {
      widen(rows.rows(i, 1, scratch).data, dim, row.data());
      to_stats[i] = encoder.encode(row.data(), to_codes + i * dim);
    }
  });
  return {codes, stats};
}

}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "encode_keys", knnext::cpu::encode_keys_cpu);
}
