#include "cpu/neighbors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace knnext::cpu {

template <class T>
template <class Token>
bool Neighbors<T>::read(const T* distances, const Token* tokens, int64_t k, int64_t vocab_size) {
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
  if (right && state_ == RowState::kSome) group(tokens, k);
  return right;
}

template <class T>
template <class Token>
void Neighbors<T>::group(const Token* tokens, int64_t k) {
  const size_t slots = std::bit_ceil(static_cast<size_t>(2 * k));
  shift_ = 64 - std::countr_zero(slots);
  slots_.assign(slots, 0);
  tokens_.clear();
  nearest_of_.clear();
  live_.resize(k);
  group_of_.resize(k);
  size_t live = 0;
  for (int64_t i = 0; i < k; ++i) {
    const T d = clean_[i];
    if (d == std::numeric_limits<T>::infinity()) continue;
    group_of_[live] = find_or_add(tokens[i], d);
    live_[live++] = d;
  }
  live_.resize(live);
}

template <class T>
uint32_t Neighbors<T>::find_or_add(int64_t token, T distance) {
  const size_t mask = slots_.size() - 1;
  size_t slot = (static_cast<uint64_t>(token) * 0x9e3779b97f4a7c15u) >> shift_;
  for (; slots_[slot]; slot = (slot + 1) & mask) {
    const uint32_t found = slots_[slot] - 1;
    if (tokens_[found] != token) continue;
    nearest_of_[found] = std::min(nearest_of_[found], distance);
    return found;
  }
  tokens_.push_back(token);
  nearest_of_.push_back(distance);
  slots_[slot] = static_cast<uint32_t>(tokens_.size());
  return slots_[slot] - 1;
}

template <class T>
void Neighbors<T>::add_up(T temperature) {
  const size_t groups = tokens_.size();
  for (size_t i = 0; i < live_.size(); ++i)
    live_[i] = (nearest_of_[group_of_[i]] - live_[i]) / temperature;
  loops_.exp(live_.data(), live_.size());
  sums_.assign(groups, 0);
  for (size_t i = 0; i < live_.size(); ++i) sums_[group_of_[i]] += live_[i];

  values_.resize(groups);
  for (size_t j = 0; j < groups; ++j) values_[j] = (nearest_ - nearest_of_[j]) / temperature;
  shares_ = values_;
  loops_.exp(shares_.data(), groups);
  double total = 0;
  for (size_t j = 0; j < groups; ++j) total += shares_[j] * sums_[j];
  for (size_t j = 0; j < groups; ++j) sums_[j] /= total;
}

template <class T>
void Neighbors<T>::to_weights(T temperature) {
  add_up(temperature);
  for (size_t j = 0; j < values_.size(); ++j) values_[j] = static_cast<T>(shares_[j] * sums_[j]);
}

template <class T>
void Neighbors<T>::to_log_weights(T temperature) {
  add_up(temperature);
  for (size_t j = 0; j < values_.size(); ++j) shares_[j] = static_cast<T>(sums_[j]);
  loops_.log(shares_.data(), shares_.size());
  for (size_t j = 0; j < values_.size(); ++j) values_[j] += shares_[j];
}

template class Neighbors<float>;
template class Neighbors<double>;
template bool Neighbors<float>::read(const float*, const int32_t*, int64_t, int64_t);
template bool Neighbors<float>::read(const float*, const int64_t*, int64_t, int64_t);
template bool Neighbors<double>::read(const double*, const int32_t*, int64_t, int64_t);
template bool Neighbors<double>::read(const double*, const int64_t*, int64_t, int64_t);

}  // namespace knnext::cpu
