// Hopper's own instructions by their documented behaviour; csrc/cuda/sm90_ptx.cuh and
// sm90/wgmma.cuh call these. What the hardware does in its own time is done here at the most
// awkward moment: a copy lands when the scheduler draws it, in any order, and its target is poison
// until then; a product reads its operands when it is waited for, and says so if they changed since
// it began; its sums are poison in between.
#pragma once

#include <array>
#include <map>

#include "emulator/matrix.h"

namespace emulate {

struct TensorMap {
  const unsigned char* address;
  int rank;
  int64_t sizes[3], strides[2];  // elements of two bytes; bytes
  int box[3];
};

// Barriers

struct MbarrierState {
  unsigned expected = 0, pending = 0, parity = 0;
  int64_t bytes = 0;  // that this phase still waits for
};
inline std::map<const void*, MbarrierState> mbarriers;
inline uint64_t mbarriers_of = 0;  // the block that they belong to

inline MbarrierState& mbarrier_at(const void* barrier, Place place) {
  if (mbarriers_of != block_serial() || !mbarriers.count(barrier))
    fail("this mbarrier was not initialised", place);
  return mbarriers[barrier];
}

inline void mbarrier_init(void* barrier, unsigned arrivals, Place place = Place::current()) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) fail("mbarrier: not aligned to 8 bytes", place);
  if (mbarriers_of != block_serial()) mbarriers.clear();
  mbarriers_of = block_serial();
  mbarriers[barrier] = {arrivals, arrivals, 0, 0};
}

inline void mbarrier_check(const void* barrier, MbarrierState& state) {
  if (state.pending || state.bytes) return;
  state.parity ^= 1;
  state.pending = state.expected;
  wake(barrier);
}

inline void mbarrier_arrive(void* barrier, unsigned bytes, Place place = Place::current()) {
  MbarrierState& state = mbarrier_at(barrier, place);
  if (!state.pending) fail("mbarrier: more arrivals than it counts", place);
  state.bytes += bytes;
  --state.pending;
  mbarrier_check(barrier, state);
  give_way();
}

// The phase before the first counts as done: a fresh barrier lets parity 1 pass.
inline void mbarrier_wait(void* barrier, unsigned parity, Place place = Place::current()) {
  if (parity > 1) fail("mbarrier: a parity is 0 or 1", place);
  give_way();
  while (mbarrier_at(barrier, place).parity == parity) wait_for("mbarrier_wait", barrier, place);
}

// Copies

inline unsigned shared_offset(const void* p) {
  const auto* base = static_cast<const unsigned char*>(dynamic_shared_memory());
  return static_cast<unsigned>(static_cast<const unsigned char*>(p) - base);
}

// 128-byte swizzle: bits 4..6 of an address are turned by bits 7..9.
inline unsigned swizzle_128(unsigned offset) {
  return offset ^ (offset >> 7 & 7) << 4;
}

inline void land(void* barrier, unsigned bytes, Place place) {
  MbarrierState& state = mbarrier_at(barrier, place);
  state.bytes -= bytes;
  mbarrier_check(barrier, state);
}

inline void tensor_land(unsigned char* to, const TensorMap& map, std::array<int, 3> at) {
  constexpr int kRowBytes = 128;
  auto* base = static_cast<unsigned char*>(dynamic_shared_memory());
  unsigned char* place = to;
  for (int run = 0; run < (map.rank == 3 ? map.box[2] : 1); ++run)
    for (int row = 0; row < map.box[1]; ++row, place += kRowBytes)
      for (int i = 0; i < map.box[0]; ++i) {
        const int64_t x = at[0] + i, y = at[1] + row, z = at[2] + run;
        unsigned char* element = base + swizzle_128(shared_offset(place) + 2 * i);
        std::memset(element, 0, 2);
        if (x < 0 || y < 0 || z < 0 || x >= map.sizes[0] || y >= map.sizes[1]) continue;
        if (map.rank == 3 && z >= map.sizes[2]) continue;
        const int64_t deep = map.rank == 3 ? z * map.strides[1] : 0;
        std::memcpy(element, map.address + 2 * x + y * map.strides[0] + deep, 2);
      }
}

inline void tensor_load(void* to, const TensorMap& map, std::array<int, 3> at, void* barrier,
                        unsigned ranks, uint64_t, Place place = Place::current()) {
  if (shared_offset(to) % 1024) fail("a swizzled box must begin at 1,024 bytes", place);
  if (map.box[0] != 64) fail("a swizzled box is 64 elements wide", place);
  const unsigned bytes = 128 * map.box[1] * (map.rank == 3 ? map.box[2] : 1);
  if (shared_offset(to) + bytes > settings.shared_limit) fail("a box beyond shared memory", place);
  for (unsigned rank = 0; rank < kMaxCluster; ++rank) {
    if (ranks ? !(ranks >> rank & 1) : rank != cluster_rank()) continue;
    auto* target = static_cast<unsigned char*>(of_block(to, rank, place));
    void* reached = of_block(barrier, rank, place);
    std::memset(target, kPoison, bytes);
    later(
        [=] {
          tensor_land(target, map, at);
          land(reached, bytes, place);
        },
        static_cast<int>(rank));
  }
}

// Products

struct Product {
  float* sums;
  int columns;
  uint64_t a, b;
  bool accumulate;
  void (*set)(Operand&, int, unsigned short);
  uint64_t seen;  // of the operands when it began
};

// Of one thread: groups of products, and what its sums hold while registers show poison.
struct Products {
  std::vector<std::vector<Product>> groups;
  std::vector<Product> open;
  std::map<float*, std::vector<float>> sums;
};
inline std::map<const Thread*, Products> products;
inline uint64_t products_of = 0;

inline Products& own_products() {
  if (products_of != block_serial()) products.clear();
  products_of = block_serial();
  return products[current];
}

// Sixteen elements of row `row` of the tile that a descriptor names.
inline void read_row(uint64_t descriptor, int row, unsigned short (&out)[16]) {
  const auto* base = static_cast<const unsigned char*>(dynamic_shared_memory());
  const unsigned start = (descriptor & 0x3FFF) << 4, eight_rows = (descriptor >> 32 & 0x3FFF) << 4;
  const unsigned line = start + row / 8 * eight_rows + row % 8 * 128;
  for (unsigned i = 0; i < 16; ++i) std::memcpy(&out[i], base + swizzle_128(line + 2 * i), 2);
}

inline uint64_t operands_seen(const Product& p, int first_row) {
  uint64_t hash = 1469598103934665603ull;
  unsigned short row[16];
  const auto add = [&](uint64_t descriptor, int i) {
    read_row(descriptor, i, row);
    for (unsigned short x : row) hash = (hash ^ x) * 1099511628211ull;
  };
  for (int i = 0; i < 16; ++i) add(p.a, first_row + i);
  for (int i = 0; i < p.columns; ++i) add(p.b, i);
  return hash;
}

template <class T>
void wgmma(float* sums, int columns, uint64_t a, uint64_t b, bool accumulate,
           Place place = Place::current()) {
  for (uint64_t d : {a, b})
    if (d >> 62 != 1 || (d >> 32 & 0x3FFF) != 64 || (d >> 49 & 7))
      fail("wgmma: not the descriptor of a tile with 128-byte swizzle", place);
  const unsigned first = current->rank - current->rank % 32;
  if (first + 32 > block_threads() || current->rank / 128 * 128 + 128 > block_threads())
    fail("wgmma: not a whole warpgroup", place);
  Product product{sums, columns, a, b, accumulate, &set_element<T>, 0};
  // One lane of each warp keeps an eye on the operands, when all lanes have come.
  meet_warp("wgmma", ~0u, &product, nullptr, false, place);
  if (lane() == 0) product.seen = operands_seen(product, current->rank % 128 / 32 * 16);
  Products& own = own_products();
  auto [held, is_new] = own.sums.try_emplace(sums, sums, sums + columns / 2);
  if (is_new) std::fill(sums, sums + columns / 2, std::numeric_limits<float>::quiet_NaN());
  own.open.push_back(product);
}

inline void multiply(const Product& p, std::vector<float>& sums, Place place) {
  const int first_row = current->rank % 128 / 32 * 16;
  if (lane() == 0 && operands_seen(p, first_row) != p.seen)
    fail("wgmma: an operand changed between the product and the wait for it", place);
  unsigned short a[2][16], b[16];
  for (int i = 0; i < 2; ++i) read_row(p.a, first_row + lane() / 4 + 8 * i, a[i]);
  Operand a_rows[2], b_column;
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 16; ++k) p.set(a_rows[i], k, a[i][k]);
  for (int column = 0; column < p.columns / 4; ++column) {
    const int j = column / 2, e = column % 2;
    read_row(p.b, 8 * j + 2 * (lane() % 4) + e, b);
    for (int k = 0; k < 16; ++k) p.set(b_column, k, b[k]);
    for (int i = 0; i < 2; ++i) {
      float& sum = sums[4 * j + 2 * i + e];
      sum = add_products(a_rows[i], b_column, p.accumulate ? sum : 0.0f, TensorCore{});
    }
  }
}

inline void wgmma_commit() {
  Products& own = own_products();
  own.groups.push_back(std::exchange(own.open, {}));
}

inline void wgmma_wait(size_t pending, Place place = Place::current()) {
  give_way();
  Products& own = own_products();
  if (!own.open.empty()) fail("wgmma: products wait for their commit", place);
  while (own.groups.size() > pending) {
    for (const Product& p : own.groups.front()) multiply(p, own.sums[p.sums], place);
    own.groups.erase(own.groups.begin());
  }
  if (own.groups.empty()) {  // else: which sums are done is not told apart
    for (auto& [sums, values] : own.sums) std::copy(values.begin(), values.end(), sums);
    own.sums.clear();
  }
  // `.sync.aligned`: no lane goes on before the warp's product is done.
  meet_warp("wgmma_wait", ~0u, nullptr, nullptr, false, place);
}

}  // namespace emulate
