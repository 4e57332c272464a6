// mma.sync, ldmatrix and cp.async by their documented layouts; csrc/cuda/ptx.cuh calls these.
#pragma once

namespace emulate {

inline float element(const __half&, unsigned short bits) {
  return __half2float({bits});
}
inline float element(const __nv_bfloat16&, unsigned short bits) {
  return __bfloat162float({bits});
}

struct Mma {
  float* d;
  const unsigned *a, *b;
  const float* c;
};

// D (16 x 8) = A (16 x 16, row) B (16 x 8, column) + C. With group = lane / 4 and t = lane % 4:
// a[r] holds A[group + 8 (r & 1)][2 t + 8 (r >> 1) + {0, 1}], b[r] holds B[2 t + 8 r + {0, 1}]
// [group], and c[r], d[r] hold [group + 8 (r >> 1)][2 t + (r & 1)]. The order of the sum over 16 is
// not documented; here it runs upwards in float32.
template <class T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                  const float (&c)[4], Place place = Place::current()) {
  Mma data{d, a, b, c};
  meet_warp(
      "mma.m16n8k16", ~0u, &data,
      [](Thread** lanes, unsigned) EMULATE_UNSEEN {
        float a_full[16][16], b_full[16][8];
        const auto half_of = [](unsigned word, int i) {
          return element(T{}, static_cast<unsigned short>(word >> 16 * i));
        };
        for (int lane = 0; lane < 32; ++lane) {
          const Mma& m = *static_cast<Mma*>(lanes[lane]->data);
          const int group = lane / 4, t = lane % 4;
          for (int r = 0; r < 4; ++r)
            for (int i = 0; i < 2; ++i)
              a_full[group + 8 * (r & 1)][2 * t + 8 * (r >> 1) + i] = half_of(m.a[r], i);
          for (int r = 0; r < 2; ++r)
            for (int i = 0; i < 2; ++i) b_full[2 * t + 8 * r + i][group] = half_of(m.b[r], i);
        }
        for (int lane = 0; lane < 32; ++lane) {
          const Mma& m = *static_cast<Mma*>(lanes[lane]->data);
          for (int r = 0; r < 4; ++r) {
            const int row = lane / 4 + 8 * (r >> 1), column = 2 * (lane % 4) + (r & 1);
            float sum = m.c[r];
            for (int k = 0; k < 16; ++k) sum += a_full[row][k] * b_full[k][column];
            m.d[r] = sum;
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
