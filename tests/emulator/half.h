// __half and __nv_bfloat16 as storage, with the conversions that the kernels use; IEEE rounding to
// nearest even.
#pragma once

struct __half {
  unsigned short bits;
};
struct __nv_bfloat16 {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half h) {
  const unsigned sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31;
  const unsigned fraction = h.bits & 0x3FFu;
  if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | fraction << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = static_cast<float>(fraction) * 0x1p-24f;  // subnormal or zero
  return sign ? -small : small;
}

inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), magnitude = bits & 0x7FFFFFFFu;
  const auto sign = static_cast<unsigned short>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7F800000u) return {static_cast<unsigned short>(0x7FFF)};
  if (magnitude >= 0x477FF000u) return {static_cast<unsigned short>(sign | 0x7C00u)};
  if (magnitude < 0x38800000u) {  // subnormal: let the addition round at 2^-24
    const float rounded = __uint_as_float(magnitude) + 0.5f;
    return {static_cast<unsigned short>(sign | (__float_as_uint(rounded) - 0x3F000000u))};
  }
  const unsigned odd = magnitude >> 13 & 1;
  return {static_cast<unsigned short>(sign | ((magnitude - 0x38000000u + 0xFFFu + odd) >> 13))};
}

inline float __bfloat162float(__nv_bfloat16 b) {
  return __uint_as_float(static_cast<unsigned>(b.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<unsigned short>(0x7FFF)};
  return {static_cast<unsigned short>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16)};
}

inline __half __float2half(float x) {
  return __float2half_rn(x);
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  return __float2bfloat16_rn(x);
}
inline __half __ushort_as_half(unsigned short x) {
  return {x};
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) {
  return {x};
}
inline unsigned short __half_as_ushort(__half h) {
  return h.bits;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) {
  return b.bits;
}
inline float2 __half22float2(__half2 h) {
  return {__half2float(h.x), __half2float(h.y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 b) {
  return {__bfloat162float(b.x), __bfloat162float(b.y)};
}
