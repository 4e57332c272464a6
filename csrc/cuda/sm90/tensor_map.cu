// Tensor maps through the driver's own encoder, found at run time: the library links no libcuda.
#include "cuda/sm90/tensor_map.h"

#include <stdexcept>
#include <string>

namespace knnext {
namespace {

constexpr int kBoxElements = 64;

#ifdef KNNEXT_EMULATOR
TensorMap encode(const RowMatrix& matrix, const int64_t (&sizes)[3], const int64_t (&strides)[2],
                 const int (&box)[3], int rank) {
  TensorMap map{};
  map.address = static_cast<const unsigned char*>(matrix.rows);
  map.rank = rank;
  for (int i = 0; i < rank; ++i) map.sizes[i] = sizes[i], map.box[i] = box[i];
  for (int i = 0; i + 1 < rank; ++i) map.strides[i] = strides[i];
  return map;
}
#else
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  check_cuda(error, "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess || !entry)
    throw std::runtime_error("knnext: this driver has no cuTensorMapEncodeTiled (CUDA 12 has)");
  return reinterpret_cast<Encode>(entry);
}

TensorMap encode(const RowMatrix& matrix, const int64_t (&sizes)[3], const int64_t (&strides)[2],
                 const int (&box)[3], int rank) {
  static const Encode encoder = find_encoder();
  cuuint64_t size[3], stride[2];
  cuuint32_t extent[3], step[3] = {1, 1, 1};
  for (int i = 0; i < rank; ++i) size[i] = sizes[i], extent[i] = box[i];
  for (int i = 0; i + 1 < rank; ++i) stride[i] = strides[i];
  TensorMap map;
  const CUresult result =
      encoder(&map,
              matrix.dtype == Dtype::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                           : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
              rank, const_cast<void*>(matrix.rows), size, stride, extent, step,
              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(
        "knnext: cuTensorMapEncodeTiled failed with CUresult " +
        std::to_string(static_cast<int>(result)) + " for " + std::to_string(matrix.num_rows) +
        " rows of " + std::to_string(matrix.dim) + " elements, " + std::to_string(matrix.stride) +
        " bytes apart, boxes of " + std::to_string(box[rank - 1]) + " rows");
  return map;
}
#endif

}  // namespace

bool tensor_map_takes(const RowMatrix& matrix) {
  const auto address = reinterpret_cast<uintptr_t>(matrix.rows);
  return (matrix.dtype == Dtype::kHalf || matrix.dtype == Dtype::kBFloat16) && address % 16 == 0 &&
         matrix.stride % 16 == 0 && matrix.stride >= 2 * matrix.dim &&
         matrix.stride < int64_t{1} << 24 && matrix.num_rows > 0;
}

TensorMap make_tensor_map(const RowMatrix& matrix, int box_rows) {
  return encode(matrix, {matrix.dim, matrix.num_rows, 1}, {matrix.stride, 0},
                {kBoxElements, box_rows, 1}, 2);
}

TensorMap make_sample_map(const RowMatrix& matrix, int64_t run, int box_rows) {
  return encode(matrix, {matrix.dim, run, matrix.num_rows / run},
                {matrix.stride, run * matrix.stride}, {kBoxElements, 1, box_rows}, 3);
}

}  // namespace knnext
