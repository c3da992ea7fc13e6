// The normal distribution's functions of a vector of numbers: gelu(z) = z * Phi(z), by the error function.
#pragma once

#include <cmath>
#include <numbers>

#include "exponential.h"

namespace stable_sam {
namespace {

// Phi(z) = (1 + erf(z / sqrt(2))) / 2, within 1e-7. With t = |z| / sqrt(2), log(erfc(t)) is a polynomial in t, fitted
// for the least error of erfc; without a constant, so that Phi(0) is 1/2. From t = 4 on erf is 1 in float. gelu(z)
// needs no closer erf around 0, where Phi is near 1/2. NaN stays NaN.
inline Vector<float> normal_cdf(Vector<float> z) {
  const Vector<float> scaled = z * (std::numbers::sqrt2_v<float> * 0.5f);
  const Vector<float> magnitude = std::bit_cast<Vector<float>>(std::bit_cast<Words>(scaled) & 0x7fffffffu);
  const Vector<float> four = Vector<float>{} + 4.0f;
  const Vector<float> t = choose(std::bit_cast<Words>(magnitude < four), magnitude, four);
  Vector<float> logarithm = t * 8.044695278e-6f - 1.060345239e-4f;
  logarithm = logarithm * t + 5.879793898e-4f;
  logarithm = logarithm * t - 1.576814801e-3f;
  logarithm = logarithm * t + 5.883969061e-5f;
  logarithm = logarithm * t + 1.921710931e-2f;
  logarithm = logarithm * t - 1.027991995e-1f;
  logarithm = logarithm * t - 6.366161108e-1f;
  logarithm = logarithm * t - 1.128379345f;
  const Vector<float> tail = 0.5f * exp_of_bounded_lanes(logarithm * t);
  const Vector<float> result = choose(std::bit_cast<Words>(z < 0.0f), tail, 1.0f - tail);
  return choose(std::bit_cast<Words>(z == z), result, z);
}

inline Vector<double> normal_cdf(Vector<double> z) {
  for (int lane = 0; lane < kLanes<double>; ++lane) z[lane] = 0.5 * std::erfc(z[lane] * (-0.5 * std::numbers::sqrt2));
  return z;
}

// The density, Phi'(z).
template <typename V>
inline V normal_pdf(V z) {
  using A = std::remove_cvref_t<decltype(z[0])>;
  const A scale = std::numbers::inv_sqrtpi_v<A> * std::numbers::sqrt2_v<A> / 2;
  return exp_of_lanes(z * z * A(-0.5)) * scale;
}

}  // namespace
}  // namespace stable_sam
