// The neighbors of one row, grouped by token: what knn_softmax and knn_interpolate share.
//
// Every sum is made around its own maximum. With n_j the nearest neighbor of token j and n the
// nearest of all, log p_j = (n - n_j) / t + log(sum_i exp((n_j - d_i) / t) / Z): both terms are
// right however far the token lies, where exp((n - d_i) / t) alone would have underflowed.
// Distances are subtracted before they are divided: nothing is lost where all of them are large.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/row_loops.h"

namespace knnext::cpu {

enum class RowState { kNone, kSome, kNan };  // no neighbor at all; neighbors; a NaN among them

template <class T>
class Neighbors {
 public:
  Neighbors() : loops_(row_loops<T>()) {}

  // Reads a row; false where a token lies outside [-1, vocab_size), which bad_token() then gives.
  template <class Token>
  bool read(const T* distances, const Token* tokens, int64_t k, int64_t vocab_size);
  int64_t bad_token() const { return bad_token_; }
  RowState state() const { return state_; }

  // After a row with neighbors: shares by token, in order of first appearance.
  void to_weights(T temperature);      // values() is p_knn
  void to_log_weights(T temperature);  // values() is log p_knn
  const std::vector<int64_t>& tokens() const { return tokens_; }
  std::vector<T>& values() { return values_; }

 private:
  template <class Token>
  void group(const Token* tokens, int64_t k);
  uint32_t find_or_add(int64_t token, T distance);
  // Leaves (nearest - nearest_j) / t in values_ and the share of Z, without it, in shares_.
  void add_up(T temperature);

  const RowLoops<T>& loops_;
  RowState state_ = RowState::kNone;
  int64_t bad_token_ = 0;
  T nearest_ = 0;
  int shift_ = 0;                // of the hash: 64 - log2(slots)
  std::vector<uint32_t> slots_;  // open addressing: group + 1, or 0
  std::vector<int64_t> tokens_;
  std::vector<T> nearest_of_;    // by group
  std::vector<double> sums_;     // by group
  std::vector<uint32_t> group_of_;
  std::vector<T> clean_, live_, values_, shares_;
};

extern template class Neighbors<float>;
extern template class Neighbors<double>;

}  // namespace knnext::cpu
