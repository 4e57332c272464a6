// The neighbors of one row, grouped by token: what knn_softmax and knn_interpolate share.
//
// Every sum is made around its own maximum. With n_j the nearest neighbor of token j and n the
// nearest of all, log p_j = (n - n_j) / t + log(sum_i exp((n_j - d_i) / t) / Z): both terms are
// right however far the token lies, where exp((n - d_i) / t) alone would have underflowed.
// Distances are subtracted before they are divided: nothing is lost where all of them are large.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/vector/row_loops.h"

namespace knnext::cpu {

enum class RowState { kNone, kSome, kNan };  // no neighbor at all; neighbors; a NaN among them

// A row of distances without its padding, and what is known of it at once.
template <class T>
class NeighborRow {
 public:
  NeighborRow() : loops_(row_loops<T>()) {}

  // Reads a row; false where a token lies outside [-1, vocab_size), which bad_token() then gives.
  template <class Token>
  bool read(const T* distances, const Token* tokens, int64_t k, int64_t vocab_size);
  int64_t bad_token() const { return bad_token_; }
  RowState state() const { return state_; }

 protected:
  const RowLoops<T>& loops_;
  RowState state_ = RowState::kNone;
  int64_t bad_token_ = 0;
  T nearest_ = 0;
  std::vector<T> clean_;  // +inf where a neighbor weighs nothing
};

template <class T>
class Neighbors : public NeighborRow<T> {
 public:
  // As NeighborRow's, and groups the neighbors by token.
  template <class Token>
  bool read(const T* distances, const Token* tokens, int64_t k, int64_t vocab_size);

  // After a row with neighbors: shares by token, in order of first appearance.
  void to_weights(T temperature);      // values() is p_knn
  void to_log_weights(T temperature);  // values() is log p_knn
  std::size_t size() const { return groups_; }
  const int64_t* tokens() const { return tokens_.data(); }
  T* values() { return values_.data(); }

 private:
  struct Slot {
    uint32_t low_bits;  // of the token, so that most misses need no look at tokens_
    uint32_t group;     // + 1; 0 is an empty slot
  };

  template <class Token>
  void group(const Token* tokens, int64_t k);
  uint32_t find_or_add(int64_t token, T distance);
  // Leaves (nearest - nearest_j) / t in values_, its exp in weights_, a group's part of Z in sums_.
  void add_up(T temperature);

  using NeighborRow<T>::clean_, NeighborRow<T>::loops_, NeighborRow<T>::nearest_;

  std::vector<Slot> slots_;  // open addressing
  int hash_shift_ = 0;       // 64 - log2(number of slots)
  std::size_t live_ = 0, groups_ = 0;
  // By neighbor that weighs, then by group; sized for the longest row so far.
  std::vector<T> exponents_;
  std::vector<uint32_t> group_of_;
  std::vector<int64_t> tokens_;
  std::vector<T> nearest_of_, values_, weights_;
  std::vector<double> sums_;
};

extern template class NeighborRow<float>;
extern template class NeighborRow<double>;
extern template class Neighbors<float>;
extern template class Neighbors<double>;

}  // namespace knnext::cpu
