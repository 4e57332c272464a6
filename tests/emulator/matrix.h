// mma.sync, ldmatrix and cp.async by their documented layouts; csrc/cuda/ptx.cuh calls these.
#pragma once

namespace emulate {

inline float element(const __half&, unsigned short bits) {
  return __half2float({bits});
}
inline float element(const __nv_bfloat16&, unsigned short bits) {
  return __bfloat162float({bits});
}

// A row or column of an operand: sixteen numbers and their exponents, which decide what is cut.
struct Operand {
  float values[16];
  int exponents[16];
};

constexpr int kNoExponent = -999;  // of zero

inline int exponent_of(float x, int lowest) {
  if (x == 0) return kNoExponent;
  return std::max(static_cast<int>(std::bit_cast<unsigned>(x) >> 23 & 0xFF) - 127, lowest);
}
constexpr int lowest_exponent(const __half&) {
  return -14;
}
constexpr int lowest_exponent(const __nv_bfloat16&) {
  return -126;
}

template <class T>
void set_element(Operand& operand, int i, unsigned short bits) {
  operand.values[i] = element(T{}, bits);
  operand.exponents[i] = exponent_of(operand.values[i], lowest_exponent(T{}));
}

inline double power_of_two(int exponent) {  // within a double's normal range
  return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// Towards zero, as the units give their sums back.
inline float cut_to_float(double x) {
  const float nearest = static_cast<float>(x);
  const bool beyond = std::fabs(x) >= 0x1p128 || !(std::fabs(nearest) > std::fabs(x));
  return beyond ? nearest : std::nextafter(nearest, 0.0f);
}

// sum + <a, b> over [begin, end) as the units do it, by what was measured on them (microsoft's
// MMA-Sim): the sum and every product are cut, towards zero, `bits` below the largest exponent
// among them, where a product's exponent is that of its factors added up; what is left is added
// exactly, and cut to float32.
inline float add_block(const Operand& a, const Operand& b, int begin, int end, float sum,
                       int bits) {
  double exact = sum;
  int largest = exponent_of(sum, -126);
  for (int k = begin; k < end; ++k) {
    exact += static_cast<double>(a.values[k]) * b.values[k];
    largest = std::max(largest, a.exponents[k] + b.exponents[k]);
  }
  if (!std::isfinite(exact)) return static_cast<float>(exact);
  if (largest < -400) return sum;  // nothing but zeros
  const double unit = power_of_two(bits - largest);
  double total = std::trunc(sum * unit);
  for (int k = begin; k < end; ++k)
    total += std::trunc(static_cast<double>(a.values[k]) * b.values[k] * unit);
  return cut_to_float(total * power_of_two(largest - bits));
}

inline float add_products(const Operand& a, const Operand& b, float sum, TensorCore core) {
  for (int k = 0; k < 16; k += core.block) sum = add_block(a, b, k, k + core.block, sum, core.bits);
  return sum;
}

struct Mma {
  float* d;
  const unsigned *a, *b;
  const float* c;
};

// D (16 x 8) = A (16 x 16, row) B (16 x 8, column) + C. With group = lane / 4 and t = lane % 4:
// a[r] holds A[group + 8 (r & 1)][2 t + 8 (r >> 1) + {0, 1}], b[r] holds B[2 t + 8 r + {0, 1}]
// [group], and c[r], d[r] hold [group + 8 (r >> 1)][2 t + (r & 1)].
template <class T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                  const float (&c)[4], Place place = Place::current()) {
  Mma data{d, a, b, c};
  meet_warp(
      "mma.m16n8k16", ~0u, &data,
      [](Thread** lanes, unsigned) EMULATE_UNSEEN {
        Operand a_rows[16], b_columns[8];
        const auto set = [](Operand& operand, int at, unsigned word) {
          for (int i = 0; i < 2; ++i)
            set_element<T>(operand, at + i, static_cast<unsigned short>(word >> 16 * i));
        };
        for (int lane = 0; lane < 32; ++lane) {
          const Mma& m = *static_cast<Mma*>(lanes[lane]->data);
          const int group = lane / 4, t = lane % 4;
          for (int r = 0; r < 4; ++r)
            set(a_rows[group + 8 * (r & 1)], 2 * t + 8 * (r >> 1), m.a[r]);
          for (int r = 0; r < 2; ++r) set(b_columns[group], 2 * t + 8 * r, m.b[r]);
        }
        for (int lane = 0; lane < 32; ++lane) {
          const Mma& m = *static_cast<Mma*>(lanes[lane]->data);
          for (int r = 0; r < 4; ++r) {
            const int row = lane / 4 + 8 * (r >> 1), column = 2 * (lane % 4) + (r & 1);
            m.d[r] = add_products(a_rows[row], b_columns[column], m.c[r], settings.tensor_core);
          }
        }
      },
      false, place);
}

struct LoadMatrix {
  unsigned* registers;
  const void* row;
};

// 8 x 8 matrices of 16-bit elements; lane 8 i + j gives the address of row j of matrix i (16 bytes,
// aligned). Register i of a lane holds row lane / 4, columns 2 (lane % 4) + {0, 1}, of matrix i;
// with `transpose`, of its transpose.
template <int count, bool transpose>
void load_matrix(unsigned (&registers)[count], const void* row, Place place = Place::current()) {
  LoadMatrix data{registers, row};
  if (lane() < 8 * count && reinterpret_cast<uintptr_t>(row) % 16)
    fail("ldmatrix: a row's address is not a multiple of 16 bytes", place);
  meet_warp(
      "ldmatrix", ~0u, &data,
      [](Thread** lanes, unsigned) {
        for (int matrix = 0; matrix < count; ++matrix) {
          unsigned short full[8][8];
          for (int j = 0; j < 8; ++j)
            std::memcpy(full[j], static_cast<LoadMatrix*>(lanes[8 * matrix + j]->data)->row, 16);
          for (int lane = 0; lane < 32; ++lane) {
            const int r = lane / 4, c = 2 * (lane % 4);
            const unsigned low = transpose ? full[c][r] : full[r][c];
            const unsigned high = transpose ? full[c + 1][r] : full[r][c + 1];
            static_cast<LoadMatrix*>(lanes[lane]->data)->registers[matrix] = low | high << 16;
          }
        }
      },
      false, place);
}

// The copy lands at the wait that promises it and not before; until then its target is poison.
// Bytes past `from_bytes` become zero.
inline void async_copy(void* to, const void* from, unsigned bytes, unsigned from_bytes,
                       Place place = Place::current()) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async copies 4, 8 or 16 bytes", place);
  if (from_bytes > bytes) fail("cp.async: more source bytes than bytes", place);
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("cp.async: an address is not aligned to the copy's size", place);
  std::memset(to, kPoison, bytes);
  current->open_group.push_back({to, from, bytes, from_bytes});
}

inline void async_commit() {
  current->groups.push_back(std::exchange(current->open_group, {}));
}

inline void async_land(const std::vector<AsyncCopy>& group) {
  for (const AsyncCopy& copy : group) {
    std::memset(copy.to, 0, copy.bytes);
    if (copy.from_bytes) std::memcpy(copy.to, copy.from, copy.from_bytes);
  }
}

// Lands all but the latest `pending` groups of this thread.
inline void async_wait(size_t pending) {
  auto& groups = current->groups;
  while (groups.size() > pending) {
    async_land(groups.front());
    groups.erase(groups.begin());
  }
}

}  // namespace emulate
