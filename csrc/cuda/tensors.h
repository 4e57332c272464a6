// How the CUDA ops read their tensor arguments.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "checks.h"
#include "cuda/device.cuh"
#include "cuda/params.h"
#include "stable_compat.h"

namespace knnext {

// Makes a tensor's device the current one while it lives, and knows that device's current stream.
// This library's own CUDA runtime has its own idea of the current device: it is told each time, and
// need not be told when torch's guard goes back.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {
    check_cuda(cudaSetDevice(tensor.get_device_index()), "device");
  }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

// A (rows, n) tensor read where it lies if only its rows are strided, else made contiguous.
class Rows {
 public:
  explicit Rows(const Tensor& tensor)
      : tensor_(tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : contiguous_copy(tensor)) {}
  const void* data() const { return tensor_.const_data_ptr(); }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data());
  }
  int64_t stride() const { return tensor_.stride(0); }

 private:
  Tensor tensor_;  // keeps a copy alive; torch's allocator reuses it only after this stream's work
};

// Scratch from torch's allocator, given back in stream order.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t words)
      : used_(words > 0), tensor_(used_ ? empty_on<1>(like, {words}, ScalarType::Long) : like) {}
  uint64_t* words() const {
    return used_ ? static_cast<uint64_t*>(tensor_.mutable_data_ptr()) : nullptr;
  }

 private:
  bool used_;
  Tensor tensor_;
};

// The gradients of distances (Q, k) and, by row, of the temperature (Q,).
struct NeighborOutputs {
  Tensor distances, temperature;

  NeighborOutputs(const Tensor& like, const MixShape& shape)
      : distances(empty_on<2>(like, {shape.num_queries, shape.k}, ScalarType::Float)),
        temperature(empty_on<1>(like, {shape.num_queries}, ScalarType::Float)) {}
  NeighborGradients pointers() const {
    return {distances.mutable_data_ptr<float>(), temperature.mutable_data_ptr<float>()};
  }
};

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Double:
      return Dtype::kDouble;
    default:
      return Dtype::kFloat;  // the checks let nothing else through
  }
}

inline RowParameter row_parameter(double number) {
  return {number, nullptr, Dtype::kDouble, 0};
}

inline RowParameter row_parameter(const Tensor& tensor) {
  const int64_t stride = tensor.dim() == 1 ? tensor.stride(0) : 0;
  return {0.0, tensor.const_data_ptr(), dtype_of(tensor), stride};
}

inline void check_max_k(const char* op, int64_t k) {
  if (k > kMaxNeighbors)
    fail(op, "k must be at most " + std::to_string(kMaxNeighbors) + " on CUDA, got " +
                 std::to_string(k));
}

inline Neighbors neighbors_of(const Rows& distances, const Rows& tokens, const Tensor& ids,
                              const MixShape& shape, const RowParameter& temperature) {
  return {distances.as<float>(),
          tokens.data(),
          distances.stride(),
          tokens.stride(),
          ids.scalar_type() == ScalarType::Int,
          shape.num_queries,
          static_cast<int>(shape.k),
          temperature};
}

}  // namespace knnext
