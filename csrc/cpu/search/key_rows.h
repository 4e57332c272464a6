// Rows of a (N, D) tensor of any strides, read where they lie.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/search/kernels.h"
#include "stable_compat.h"

namespace knnext::cpu {

Element element_of(const Tensor& t);  // of a float16, bfloat16 or float32 tensor

// Which rows a kernel reads: row_stride elements apart, each row contiguous.
struct RowBlock {
  const char* data;
  int64_t row_stride;
};

class KeyRows {
 public:
  explicit KeyRows(const Tensor& keys);

  int64_t num_rows() const { return num_rows_; }
  int64_t dim() const { return dim_; }
  Element element() const { return element_; }
  int64_t element_bytes() const { return element_bytes_; }

  // `count` rows from `first`, dimensions [d, d + dims). Rows that do not lie contiguous are copied
  // into `scratch`, so that no more than a few are ever held twice.
  RowBlock rows(int64_t first, int64_t count, int64_t d, int64_t dims,
                std::vector<char>& scratch) const;
  RowBlock rows(int64_t first, int64_t count, std::vector<char>& scratch) const {
    return rows(first, count, 0, dim_, scratch);
  }
  // Asks for a row ahead of its use; of columns that lie apart it asks for nothing. Inlined always:
  // gcc 12 takes a function that only prefetches for one without effect, and drops calls of it.
  [[gnu::always_inline]] inline void fetch(int64_t row) const {
    if (column_stride_ != 1) return;
    const char* from = data_ + row * row_stride_ * element_bytes_;
    for (int64_t at = 0; at < dim_ * element_bytes_; at += 64) __builtin_prefetch(from + at);
  }

 private:
  const char* data_;
  int64_t num_rows_, dim_, row_stride_, column_stride_, element_bytes_;
  Element element_;
};

// (count,) squared norms of rows [first, first + count), summed as the search sums its products.
void row_sqnorms(const KeyRows& keys, int64_t first, int64_t count, float* out);

}  // namespace knnext::cpu
