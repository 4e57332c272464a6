// What an epilogue needs beside the product of a tile, in shared memory.
#pragma once

#include "cuda/device.cuh"

namespace knnext {

template <class Tile>
struct TileSide {
  // Infinite beyond the last key, and bounds NaN beyond the last query: nothing there passes.
  float key_norms[Tile::kKeys], query_norms[Tile::kQueries], bounds[Tile::kQueries];
  int key_rows[Tile::kKeys];      // in the chunk
  int last_ties[Tile::kQueries];  // the thresholds' rows, where there are thresholds
};

}  // namespace knnext
