#include "cpu/search/key_rows.h"

#include <algorithm>
#include <cstring>

namespace knnext::cpu {
namespace {

template <class Word>
void copy_strided(const char* from, int64_t row_stride, int64_t column_stride, int64_t count,
                  int64_t dims, char* to) {
  const Word* source = reinterpret_cast<const Word*>(from);
  Word* target = reinterpret_cast<Word*>(to);
  // Rows innermost: where columns are far apart, rows mostly lie side by side (a transposed store).
  for (int64_t d = 0; d < dims; ++d)
    for (int64_t i = 0; i < count; ++i)
      target[i * dims + d] = source[i * row_stride + d * column_stride];
}

}  // namespace

Element element_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      return Element::kFloat;
  }
}

KeyRows::KeyRows(const Tensor& keys)
    : data_(static_cast<const char*>(keys.const_data_ptr())),
      num_rows_(keys.size(0)),
      dim_(keys.size(1)),
      row_stride_(keys.stride(0)),
      column_stride_(keys.stride(1)),
      element_bytes_(keys.element_size()),
      element_(element_of(keys)) {}

RowBlock KeyRows::rows(int64_t first, int64_t count, int64_t d, int64_t dims,
                       std::vector<char>& scratch) const {
  const char* from = data_ + (first * row_stride_ + d * column_stride_) * element_bytes_;
  if (column_stride_ == 1 || dim_ == 1) return {from, row_stride_};
  scratch.resize(std::max<size_t>(scratch.size(), count * dims * element_bytes_));
  auto copy = element_bytes_ == 2 ? copy_strided<uint16_t> : copy_strided<uint32_t>;
  copy(from, row_stride_, column_stride_, count, dims, scratch.data());
  return {scratch.data(), dims};
}

void row_sqnorms(const KeyRows& keys, int64_t first, int64_t count, float* out) {
  const SearchKernels& kernels = search_kernels();
  const int64_t width = kernels.panel_keys;
  alignas(64) float panel[kDimBlock * kMaxPanelKeys];
  float sums[kMaxPanelKeys];
  std::vector<char> scratch;
  for (int64_t start = 0; start < count; start += width) {
    const int64_t n = std::min(width, count - start);
    float* to = out + start;
    std::fill(to, to + n, 0.0f);
    for (int64_t d = 0; d < keys.dim(); d += kDimBlock) {
      const int64_t dims = std::min(kDimBlock, keys.dim() - d);
      const RowBlock rows = keys.rows(first + start, n, d, dims, scratch);
      kernels.pack[static_cast<int>(keys.element())](rows.data, rows.row_stride,
                                                     static_cast<int>(n), dims, panel);
      kernels.sqnorms(panel, dims, sums);
      for (int64_t i = 0; i < n; ++i) to[i] += sums[i];
    }
  }
}

}  // namespace knnext::cpu
