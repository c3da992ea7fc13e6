// e^x of a vector of numbers, which the C library takes one at a time.
#pragma once

#include <cmath>

#include "vector.h"

namespace stable_sam {
namespace {

inline Vector<float> choose(Words condition, Vector<float> yes, Vector<float> no) {
  return std::bit_cast<Vector<float>>(choose(condition, std::bit_cast<Words>(yes), std::bit_cast<Words>(no)));
}

// e^x for |x| <= 87: 2^n e^r with |r| <= ln(2) / 2 and ln(2) in two parts; polynomial of Cephes' expf.
inline Vector<float> exp_of_bounded_lanes(Vector<float> x) {
  const Vector<float> round_bias = Vector<float>{} + 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Vector<float> biased = x * 1.44269504f + round_bias;
  const Vector<float> n = biased - round_bias;
  const Vector<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector<float> polynomial = r * 1.9875691500e-4f + 1.3981999507e-3f;
  polynomial = polynomial * r + 8.3334519073e-3f;
  polynomial = polynomial * r + 4.1665795894e-2f;
  polynomial = polynomial * r + 1.6666665459e-1f;
  polynomial = polynomial * r + 5.0000001201e-1f;
  const Vector<float> fraction = polynomial * r * r + r + 1.0f;
  const Words exponent = std::bit_cast<Words>(biased) << 23;
  return std::bit_cast<Vector<float>>(std::bit_cast<Words>(fraction) + exponent);
}

// e^x for x <= 87, within two units in the last place; 0 below -87, whose e^x is next to float's smallest normal
// number. NaN stays NaN.
inline Vector<float> exp_of_lanes(Vector<float> x) {
  const Vector<float> lowest = Vector<float>{} - 87.0f;
  const Words is_tiny = std::bit_cast<Words>(x < lowest);
  const Vector<float> power = exp_of_bounded_lanes(choose(is_tiny, lowest, x));
  return choose(std::bit_cast<Words>(x == x), choose(is_tiny, Vector<float>{}, power), x);
}

inline Vector<double> exp_of_lanes(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

}  // namespace
}  // namespace stable_sam
