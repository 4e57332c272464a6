// The order in which kernel sm90_filter walks over tiles; plain arithmetic, for host and device.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define KNNEXT_BOTH_SIDES __host__ __device__
#else
#define KNNEXT_BOTH_SIDES
#endif

namespace knnext {

// Items are pairs (query group, key tile); a group is what one cluster takes at a time.
//
//             key tiles ->    block 0           block 1
//   band 0 (8 groups)       0 8 16 24 ...     (after all bands of block 0)
//                           1 9 17
//   band 1                  (after band 0 of block 0)
//
// Clusters that run at one time then share 8 groups of queries and about 8 key tiles: both are read
// from memory once and from L2 by the others. A block's keys stay in L2 until all queries have met
// them, a band's queries until the block ends.
struct FilterRaster {
  static constexpr int kBandGroups = 8;
  int groups = 0, key_tiles = 0;
  int block_tiles = 1;

  static FilterRaster plan(int64_t groups, int64_t key_tiles, int64_t tile_bytes) {
    constexpr int64_t kBlockBytes = int64_t{12} << 20;  // of 50 MB, in two halves that copy lines
    FilterRaster raster;
    raster.groups = static_cast<int>(groups);
    raster.key_tiles = static_cast<int>(key_tiles);
    raster.block_tiles = static_cast<int>(std::clamp<int64_t>(kBlockBytes / tile_bytes, 8, 512));
    return raster;
  }

  KNNEXT_BOTH_SIDES int items() const { return groups * key_tiles; }

  KNNEXT_BOTH_SIDES void find(int item, int& group, int& key_tile) const {
    const int block = item / (block_tiles * groups);
    int rest = item - block * block_tiles * groups;
    const int left = key_tiles - block * block_tiles;
    const int width = left < block_tiles ? left : block_tiles;
    const int band = rest / (width * kBandGroups);
    rest -= band * width * kBandGroups;
    const int below = groups - band * kBandGroups;
    const int height = below < kBandGroups ? below : kBandGroups;
    key_tile = block * block_tiles + rest / height;
    group = band * kBandGroups + rest % height;
  }
};

}  // namespace knnext
