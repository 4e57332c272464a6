// What torch's stable ABI lacks at the version this library targets (2.10). Each shim is dated and
// says when it can go.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

struct CUstream_st;

namespace knnext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bytes of an element.
int64_t item_bytes(ScalarType dtype);

// For a call of torch's that failed, inside a catch block: throws what the current op and torch
// have to say. torch keeps its reason from 2.13 on.
[[noreturn]] void fail_torch(const std::string& what);
// Memory that could not be had: torch.OutOfMemoryError on CUDA, and on the CPU a RuntimeError, as
// torch's own allocator gives. `what_for` ends the sentence.
[[noreturn]] void fail_memory(const std::string& what_for);
[[noreturn]] void fail_allocation(const Tensor& like, const int64_t* sizes, size_t count,
                                  ScalarType dtype);

// An uninitialised tensor on the device of `like`. The stable new_empty takes an array view.
template <size_t n>
Tensor empty_on(const Tensor& like, const std::array<int64_t, n>& sizes, ScalarType dtype) {
  try {
    return torch::stable::new_empty(like, {sizes.data(), n}, dtype);
  } catch (const std::runtime_error&) {
    fail_allocation(like, sizes.data(), n, dtype);
  }
}

Tensor contiguous_copy(const Tensor& t);

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : contiguous_copy(t);
}

// Fills a tensor with zeros and returns it.
Tensor zeroed(Tensor t);

// The CUDA stream that torch works on now (2026-11: the stable headers hand out raw streams from
// torch 2.13 on; until that is the target, the C shim does). It is looked up in the library that
// torch has loaded: to link against it would keep knnext from loading beside a torch without CUDA.
inline CUstream_st* current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<GetStream>(symbol);
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("knnext: torch gives no CUDA stream; is this torch built with CUDA?");
  return static_cast<CUstream_st*>(stream);
}

}  // namespace knnext
