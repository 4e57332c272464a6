// What the gradients of the three mixing ops share. Each op sends a share s_i of its gradient
// through the weight a_i = softmax_i(z), z_i = -d_i / t, of every neighbor; from there on all are
// alike:
//   dz_i = s_i - a_i sum_j s_j        dd_i = -dz_i / t        dt = sum_i dz_i (d_i - n) / t^2
// A row of dz sums to 0, so any origin does for dt; from the nearest distance n the factors are
// small, and so is their rounding.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/mixing/arguments.h"
#include "cpu/mixing/neighbors.h"
#include "stable_compat.h"

namespace knnext::cpu {

template <class T>
class NeighborGradients : public NeighborRow<T> {
 public:
  // After a row with neighbors; sizes shares() for the caller to fill.
  void weigh(T temperature);
  std::size_t size() const { return weights_.size(); }
  bool weighs(std::size_t i) const { return clean_[i] != std::numeric_limits<T>::infinity(); }
  const T* weights() const { return weights_.data(); }
  const T* log_weights() const { return log_weights_.data(); }
  T* shares() { return shares_.data(); }
  void write(T temperature, T* out_distances, T* out_temperature) const;

 private:
  using NeighborRow<T>::clean_, NeighborRow<T>::loops_, NeighborRow<T>::nearest_;

  std::vector<T> weights_, log_weights_, shares_;
};

// The gradients of distances (Q, k) and, by row, of the temperature (Q,).
struct NeighborOutputs {
  Tensor distances, temperature;

  NeighborOutputs(const Tensor& like, const MixShape& shape)
      : distances(new_output(like, shape.num_queries, shape.k, like.scalar_type())),
        temperature(empty_on<1>(like, {shape.num_queries}, like.scalar_type())) {}

  // A row without neighbors, or of NaN.
  template <class T>
  void fill(int64_t row, T value) {
    const int64_t k = distances.size(1);
    std::fill_n(distances.mutable_data_ptr<T>() + row * k, k, value);
    temperature.mutable_data_ptr<T>()[row] = value;
  }
  template <class T>
  void write(int64_t row, const NeighborGradients<T>& neighbors, T at_temperature) {
    neighbors.write(at_temperature, distances.mutable_data_ptr<T>() + row * distances.size(1),
                    temperature.mutable_data_ptr<T>() + row);
  }
};

extern template class NeighborGradients<float>;
extern template class NeighborGradients<double>;

}  // namespace knnext::cpu
