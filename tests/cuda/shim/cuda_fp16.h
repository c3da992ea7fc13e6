// float16 by bits, rounded to the nearest even as the hardware does. Stands in for CUDA's own header.
#pragma once

#include <algorithm>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

struct __half2 {
  __half x, y;
};

inline float __half2float(__half half) {
  const unsigned sign = (half.bits & 0x8000u) << 16;
  const unsigned exponent = (half.bits >> 10) & 0x1fu;
  const unsigned mantissa = half.bits & 0x3ffu;
  if (exponent == 0x1fu) return __uint_as_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return __uint_as_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float subnormal = std::ldexp(static_cast<float>(mantissa), -24);
  return sign != 0 ? -subnormal : subnormal;
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000u : 0u;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {0x7fffu};
  if (magnitude == 0.0f) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  // The distance between neighbouring halves at this magnitude; nearbyint rounds ties to even.
  int exponent;
  std::frexp(magnitude, &exponent);
  const int unit = std::max(exponent - 11, -24);
  const auto steps = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // From the subnormals on, bits count the steps: carries run into the exponent by themselves.
  const unsigned base = unit == -24 ? 0u : static_cast<unsigned>(unit + 24) << 10;
  return {static_cast<uint16_t>(sign | (base + steps))};
}

inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
