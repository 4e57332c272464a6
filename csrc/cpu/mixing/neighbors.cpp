#include "cpu/mixing/neighbors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace knnext::cpu {

template <class T>
template <class Token>
bool NeighborRow<T>::read(const T* distances, const Token* tokens, int64_t k, int64_t vocab_size) {
  clean_.resize(k);
  Survey<T> found;
  if constexpr (sizeof(Token) == 4)
    found = loops_.clean_int32(distances, tokens, k, clean_.data());
  else
    found = loops_.clean_int64(distances, tokens, k, clean_.data());
  const bool right = found.lowest >= -1 && found.highest < vocab_size;
  if (!right) bad_token_ = found.lowest < -1 ? found.lowest : found.highest;
  nearest_ = found.nearest;
  constexpr T inf = std::numeric_limits<T>::infinity();
  state_ = found.has_nan || nearest_ == -inf ? RowState::kNan
           : nearest_ == inf                 ? RowState::kNone
                                             : RowState::kSome;
  return right;
}

template <class T>
template <class Token>
bool Neighbors<T>::read(const T* distances, const Token* tokens, int64_t k, int64_t vocab_size) {
  if (!NeighborRow<T>::read(distances, tokens, k, vocab_size)) return false;
  if (this->state() == RowState::kSome) group(tokens, k);
  return true;
}

template <class T>
template <class Token>
void Neighbors<T>::group(const Token* tokens, int64_t k) {
  const size_t slots = std::bit_ceil(static_cast<size_t>(4 * k));  // a quarter full: few clashes
  hash_shift_ = 64 - std::countr_zero(slots);
  slots_.assign(slots, {0, 0});
  for (auto* by_neighbor : {&exponents_, &nearest_of_, &values_, &weights_}) by_neighbor->resize(k);
  group_of_.resize(k);
  tokens_.resize(k);
  sums_.resize(k);
  live_ = groups_ = 0;
  for (int64_t i = 0; i < k; ++i) {
    const T d = clean_[i];
    if (d == std::numeric_limits<T>::infinity()) continue;
    group_of_[live_] = find_or_add(tokens[i], d);
    exponents_[live_++] = d;
  }
}

template <class T>
inline uint32_t Neighbors<T>::find_or_add(int64_t token, T distance) {
  const size_t mask = slots_.size() - 1;
  const uint32_t low_bits = static_cast<uint32_t>(token);
  size_t at = (static_cast<uint64_t>(token) * 0x9e3779b97f4a7c15u) >> hash_shift_;
  for (; slots_[at].group; at = (at + 1) & mask) {
    const uint32_t found = slots_[at].group - 1;
    if (slots_[at].low_bits != low_bits || tokens_[found] != token) continue;
    if (distance < nearest_of_[found]) nearest_of_[found] = distance;
    return found;
  }
  tokens_[groups_] = token;
  nearest_of_[groups_] = distance;
  slots_[at] = {low_bits, static_cast<uint32_t>(groups_ + 1)};
  return static_cast<uint32_t>(groups_++);
}

template <class T>
void Neighbors<T>::add_up(T temperature) {
  for (size_t i = 0; i < live_; ++i)
    exponents_[i] = (nearest_of_[group_of_[i]] - exponents_[i]) / temperature;
  loops_.exp(exponents_.data(), live_);
  std::fill_n(sums_.begin(), groups_, 0.0);
  for (size_t i = 0; i < live_; ++i) sums_[group_of_[i]] += exponents_[i];

  for (size_t j = 0; j < groups_; ++j) values_[j] = (nearest_ - nearest_of_[j]) / temperature;
  std::copy_n(values_.begin(), groups_, weights_.begin());
  loops_.exp(weights_.data(), groups_);
  double total = 0;
  for (size_t j = 0; j < groups_; ++j) total += weights_[j] * sums_[j];
  for (size_t j = 0; j < groups_; ++j) sums_[j] /= total;
}

template <class T>
void Neighbors<T>::to_weights(T temperature) {
  add_up(temperature);
  for (size_t j = 0; j < groups_; ++j) values_[j] = static_cast<T>(weights_[j] * sums_[j]);
}

template <class T>
void Neighbors<T>::to_log_weights(T temperature) {
  add_up(temperature);
  for (size_t j = 0; j < groups_; ++j) weights_[j] = static_cast<T>(sums_[j]);
  loops_.log(weights_.data(), groups_);
  for (size_t j = 0; j < groups_; ++j) values_[j] += weights_[j];
}

#define KNNEXT_INSTANTIATE(T)                                                     \
  template class NeighborRow<T>;                                                  \
  template class Neighbors<T>;                                                    \
  template bool NeighborRow<T>::read(const T*, const int32_t*, int64_t, int64_t); \
  template bool NeighborRow<T>::read(const T*, const int64_t*, int64_t, int64_t); \
  template bool Neighbors<T>::read(const T*, const int32_t*, int64_t, int64_t);   \
  template bool Neighbors<T>::read(const T*, const int64_t*, int64_t, int64_t);
KNNEXT_INSTANTIATE(float)
KNNEXT_INSTANTIATE(double)

}  // namespace knnext::cpu
