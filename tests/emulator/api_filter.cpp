// The walk of kernel sm90_filter over its tiles.
#include "cuda/sm90/raster.h"
#include "emulator/api.h"

// out[2 i], out[2 i + 1]: query group and key tile of item i.
EMULATED emulate_filter_raster(int64_t groups, int64_t key_tiles, int64_t tile_bytes,
                               int64_t* out) {
  return emulate::guarded(0, [=] {
    const auto raster = knnext::FilterRaster::plan(groups, key_tiles, tile_bytes);
    for (int item = 0; item < raster.items(); ++item) {
      int group = -1, key_tile = -1;
      raster.find(item, group, key_tile);
      out[2 * item] = group;
      out[2 * item + 1] = key_tile;
    }
  });
}
