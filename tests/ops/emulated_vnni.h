// What AVX-VNNI and AVX-512 (with VNNI) compute, on a processor with AVX2 alone: included before
// loops_avx2_vnni.cpp and loops_avx512*.cpp, so that their arithmetic is tested where they cannot
// run. Only what those files use; one lane after the other, as Intel's manual has it.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define KNNEXT_IN_PLACE(sum)  // a vector of 512 bits is no register here

namespace emulated {

// Four bytes, unsigned times signed, and the sum of all, modulo 2^32.
inline int32_t dpbusd_lane(int32_t sum, int32_t bytes, int32_t codes) {
  uint32_t total = static_cast<uint32_t>(sum);
  for (int i = 0; i < 32; i += 8) {
    const int32_t a = static_cast<uint8_t>(static_cast<uint32_t>(bytes) >> i);
    const int32_t b = static_cast<int8_t>(static_cast<uint32_t>(codes) >> i);
    total += static_cast<uint32_t>(a * b);
  }
  return static_cast<int32_t>(total);
}

inline __m256i dpbusd(__m256i sum, __m256i a, __m256i b) {
  int32_t s[8], x[8], y[8];
  std::memcpy(s, &sum, 32);
  std::memcpy(x, &a, 32);
  std::memcpy(y, &b, 32);
  for (int i = 0; i < 8; ++i) s[i] = dpbusd_lane(s[i], x[i], y[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s));
}

struct Floats {
  float at[16];
};
struct Words {
  int32_t at[16];
};

template <class T, class F>
T each(const F& f) {
  T out;
  for (int i = 0; i < 16; ++i) out.at[i] = f(i);
  return out;
}

inline Floats set1_ps(float x) {
  return each<Floats>([&](int) { return x; });
}
inline Floats setzero_ps() {
  return set1_ps(0.0f);
}
inline Floats loadu_ps(const void* from) {
  Floats out;
  std::memcpy(&out, from, 64);
  return out;
}
inline void storeu_ps(void* to, Floats x) {
  std::memcpy(to, &x, 64);
}
inline Floats add_ps(Floats a, Floats b) {
  return each<Floats>([&](int i) { return a.at[i] + b.at[i]; });
}
inline Floats mul_ps(Floats a, Floats b) {
  return each<Floats>([&](int i) { return a.at[i] * b.at[i]; });
}
inline Floats fmadd_ps(Floats a, Floats b, Floats c) {
  return each<Floats>([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); });
}
inline Floats max_ps(Floats a, Floats b) {
  return each<Floats>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
inline Floats sqrt_ps(Floats x) {
  return each<Floats>([&](int i) { return std::sqrt(x.at[i]); });
}
inline unsigned less_mask(Floats a, Floats b) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(a.at[i] < b.at[i]) << i;
  return mask;
}
inline Floats cvtepi32_ps(Words x) {
  return each<Floats>([&](int i) { return static_cast<float>(x.at[i]); });
}

inline Words loadu_si512(const void* from) {
  Words out;
  std::memcpy(&out, from, 64);
  return out;
}
inline void storeu_si512(void* to, Words x) {
  std::memcpy(to, &x, 64);
}
inline Words set1_epi32(int x) {
  return each<Words>([&](int) { return x; });
}
inline Words setzero_si512() {
  return set1_epi32(0);
}
inline Words set1_epi8(char x) {
  return set1_epi32(static_cast<int32_t>(0x01010101u * static_cast<uint8_t>(x)));
}
inline Words xor_si512(Words a, Words b) {
  return each<Words>([&](int i) { return a.at[i] ^ b.at[i]; });
}
inline Words add_epi32(Words a, Words b) {
  return each<Words>([&](int i) {
    return static_cast<int32_t>(static_cast<uint32_t>(a.at[i]) + static_cast<uint32_t>(b.at[i]));
  });
}
inline Words madd_epi16(Words a, Words b) {
  return each<Words>([&](int i) {
    const auto half = [](int32_t x, int part) {
      return static_cast<int32_t>(static_cast<int16_t>(static_cast<uint32_t>(x) >> (16 * part)));
    };
    return half(a.at[i], 0) * half(b.at[i], 0) + half(a.at[i], 1) * half(b.at[i], 1);
  });
}
inline Words cvtepi8_epi16(__m256i x) {
  int8_t from[32];
  int16_t wide[32];
  std::memcpy(from, &x, 32);
  for (int i = 0; i < 32; ++i) wide[i] = from[i];
  return loadu_si512(wide);
}
inline Words dpbusd_512(Words sum, Words a, Words b) {
  return each<Words>([&](int i) { return dpbusd_lane(sum.at[i], a.at[i], b.at[i]); });
}
inline int32_t reduce_add_epi32(Words x) {
  uint32_t sum = 0;
  for (int32_t lane : x.at) sum += static_cast<uint32_t>(lane);
  return static_cast<int32_t>(sum);
}
// Within each quarter of four lanes.
inline Words unpack_epi32(Words a, Words b, int high) {
  return each<Words>([&](int i) {
    const int from = i / 4 * 4 + i % 4 / 2 + 2 * high;
    return i % 2 ? b.at[from] : a.at[from];
  });
}
inline Words unpack_epi64(Words a, Words b, int high) {
  return each<Words>([&](int i) {
    const int from = i / 4 * 4 + i % 2 + 2 * high;
    return i % 4 < 2 ? a.at[from] : b.at[from];
  });
}
inline Words shuffle_i32x4(Words a, Words b, int quarters) {
  return each<Words>([&](int i) {
    const Words& from = i < 8 ? a : b;
    return from.at[(quarters >> (i / 4 * 2) & 3) * 4 + i % 4];
  });
}

}  // namespace emulated

#define _mm256_dpbusd_avx_epi32 emulated::dpbusd

#define __AVX512F__ 1
#define __m512 emulated::Floats
#define __m512i emulated::Words
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_add_ps emulated::add_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_sqrt_ps emulated::sqrt_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, how) emulated::less_mask(a, b)
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_xor_si512 emulated::xor_si512
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_cvtepi8_epi16 emulated::cvtepi8_epi16
#define _mm512_dpbusd_epi32 emulated::dpbusd_512
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#define _mm512_unpacklo_epi32(a, b) emulated::unpack_epi32(a, b, 0)
#define _mm512_unpackhi_epi32(a, b) emulated::unpack_epi32(a, b, 1)
#define _mm512_unpacklo_epi64(a, b) emulated::unpack_epi64(a, b, 0)
#define _mm512_unpackhi_epi64(a, b) emulated::unpack_epi64(a, b, 1)
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
