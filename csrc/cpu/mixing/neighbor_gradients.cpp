#include "cpu/mixing/neighbor_gradients.h"

#include <cmath>

namespace knnext::cpu {

template <class T>
void NeighborGradients<T>::weigh(T temperature) {
  const std::size_t k = clean_.size();
  for (auto* row : {&weights_, &log_weights_, &shares_}) row->resize(k);
  for (std::size_t i = 0; i < k; ++i) log_weights_[i] = (nearest_ - clean_[i]) / temperature;
  std::copy_n(log_weights_.begin(), k, weights_.begin());
  loops_.exp(weights_.data(), k);
  double total = 0;
  for (std::size_t i = 0; i < k; ++i) total += weights_[i];
  const T scale = static_cast<T>(1 / total), log_total = static_cast<T>(std::log(total));
  for (std::size_t i = 0; i < k; ++i) weights_[i] *= scale;
  for (std::size_t i = 0; i < k; ++i) log_weights_[i] -= log_total;
}

template <class T>
void NeighborGradients<T>::write(T temperature, T* out_distances, T* out_temperature) const {
  const std::size_t k = clean_.size();
  double sum = 0;
  for (std::size_t i = 0; i < k; ++i) sum += shares_[i];
  const T total = static_cast<T>(sum);
  for (std::size_t i = 0; i < k; ++i)
    out_distances[i] = (weights_[i] * total - shares_[i]) / temperature;
  double to_temperature = 0;
  for (std::size_t i = 0; i < k; ++i) {
    const T away = weighs(i) ? clean_[i] - nearest_ : T{0};
    to_temperature -= out_distances[i] * (away / temperature);
  }
  *out_temperature = static_cast<T>(to_temperature);
}

template class NeighborGradients<float>;
template class NeighborGradients<double>;

}  // namespace knnext::cpu
