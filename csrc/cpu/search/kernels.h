// The inner loops of the search, one set for each vector path, behind plain function pointers.
//
// Every (query, key) product is summed in one fixed order whatever the path around it does: in
// order of the dimension, within blocks of kDimBlock whose sums are then added in order. Vector
// lanes hold different keys, never parts of one sum. So equal keys get bit-equal scores in every
// tile, tail, chunk and thread, and a norm (the product of a row with itself) is bit-equal to the
// product of two identical rows: their distance is exactly 0.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace knnext::cpu {

// Summing blocks apart keeps the float32 error near 2e-7 |q| |x|, where one long chain would pass
// 1e-6 at a few hundred dimensions.
constexpr int64_t kDimBlock = 128;

constexpr int kMaxTileRows = 8;
constexpr int kMaxPanelKeys = 48;

enum class Element : int { kHalf = 0, kBFloat16 = 1, kFloat = 2 };

// The candidates of one query: (distance, row) packed by pack_candidate. bound.h says what the
// "distance" is, and sets both terms.
struct QueryList {
  uint64_t* entries;
  int64_t size;
  float threshold;  // only smaller distances are still listed
  float term, key_weight;
};

struct Selection {
  int64_t k;         // that a list keeps when it is cut back
  int64_t capacity;  // at which that happens
};

struct Tile {
  const float* products;   // (rows, panel keys)
  const float* key_terms;  // of the panel's keys; inf where the panel is padded: never below
  int rows;
  uint32_t first_key;
  float product_weight;  // -2 for "l2", -1 for "ip"
  float least;           // what is smaller is raised to it
  bool nan_is_least;     // NaN passes every test as `least`; otherwise it passes none
};

// What a sweep computes of a query and a key: a distance by the direct form, or their product.
enum class SweepForm : int { kDirectL2 = 0, kDirectIp = 1, kProduct = 2 };

// A few queries against keys that are read where they lie, once and in their order.
struct Sweep {
  const void* keys;
  int64_t row_stride;  // elements
  int num_keys;        // at most panel_keys
  int64_t dims;
  const float* queries;  // (num_queries, dims)
  int num_queries;
  float* scores;   // (num_queries, panel_keys)
  float* sqnorms;  // (panel_keys,): of the keys, beside products alone
};

struct SearchKernels {
  int tile_rows;   // queries of one register tile
  int panel_keys;  // keys of one register tile

  // Rows (row_stride elements apart) into a panel (dims, panel_keys) of float32, zeros after the
  // last row. Indexed by Element.
  void (*pack[3])(const void* rows, int64_t row_stride, int num_rows, int64_t dims, float* panel);
  // (panel_keys,) squared norms of a panel's keys.
  void (*sqnorms)(const float* panel, int64_t dims, float* sums);
  // products (rows, panel_keys) of a query tile (dims, tile_rows) and a panel.
  void (*multiply)(const float* tile, const float* panel, int64_t dims, int rows, float* products);
  // Appends what is finite and lies below each query's threshold; lists hold panel_keys more than
  // the capacity.
  void (*filter)(const Tile& tile, const Selection& selection, QueryList* lists);
  // Converts one row to float32. Indexed by Element.
  void (*widen[3])(const void* row, int64_t dims, float* out);
  // Distance by direct subtraction ("l2") or the negated product ("ip") of a float32 query and
  // one key. Lanes hold parts of the sum here, always the same ones.
  float (*direct_l2[3])(const float* query, const void* key, int64_t dims);
  float (*direct_ip[3])(const float* query, const void* key, int64_t dims);

  // Indexed by SweepForm and Element. Lanes hold parts of the sum: of a distance those of direct_*,
  // and so its bits; of a product or norm at least 16 parts, which makes it no less exact.
  void (*sweep[3][3])(const Sweep& sweep);

  auto direct(bool l2, Element element) const {
    return (l2 ? direct_l2 : direct_ip)[static_cast<int>(element)];
  }
};

const SearchKernels& search_kernels();  // those of isa()

extern const SearchKernels kPlainKernels;
#if defined(__x86_64__)
extern const SearchKernels kAvx2Kernels;
extern const SearchKernels kAvx512Kernels;
#elif defined(__aarch64__)
extern const SearchKernels kNeonKernels;
#endif

}  // namespace knnext::cpu
