// Row numbers of keys that a caller names.
#pragma once

#include <cstdint>

namespace knnext::cpu {

// Fails on the first of `total` indices outside [-1, num_keys). Called before anything is read, so
// that a bad index is named whichever thread would meet it.
void check_key_indices(const int64_t* indices, int64_t total, int64_t num_keys);

}  // namespace knnext::cpu
