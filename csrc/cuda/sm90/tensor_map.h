// Descriptions of matrices for Hopper's copy engine, made on the host by the driver.
#pragma once

#include "cuda/params.h"
#include "cuda/sm90/ptx.cuh"

namespace knnext {

// Rows of 16-bit elements, `dim` adjacent ones each, the next row `stride` bytes further.
struct RowMatrix {
  const void* rows;
  int64_t stride, num_rows, dim;
  Dtype dtype;  // kHalf or kBFloat16
};

// Whether the copy engine can read it: 16-byte aligned rows that do not overlap, D below 2^32.
bool tensor_map_takes(const RowMatrix& matrix);

// A map whose boxes are box_rows (up to 256) rows of 64 elements, 128 bytes, swizzled as
// wgmma.cuh reads them: tensor_load(to, map, element, row, ...).
TensorMap make_tensor_map(const RowMatrix& matrix, int box_rows);

// Rows in runs of `run` rows; a box takes one row of each of box_rows runs, at one place in them:
// tensor_load_3d(to, map, element, place in the run, first run, ...). What is left of the matrix
// behind the last whole run is out of reach.
TensorMap make_sample_map(const RowMatrix& matrix, int64_t run, int box_rows);

}  // namespace knnext
