// The normal distribution's functions of a vector of numbers: gelu(z) = z * Phi(z), by the error function.
#pragma once

#include <cmath>
#include <numbers>

#include "exponential.h"

namespace stable_sam {
namespace {

// Phi(z) = (1 + erf(z / sqrt(2))) / 2, within 1e-7. With t = |z| / sqrt(2): below 0.93 erf(t) / t is a polynomial in
// t^2, above log(erfc(t)) is one in t; both by least squares on Chebyshev nodes, weighted for the error of erf. Beyond
// 4, erf is 1 in float. NaN stays NaN.
inline Vector<float> normal_cdf(Vector<float> z) {
  const Vector<float> scaled = z * std::numbers::sqrt2_v<float> * 0.5f;
  const Vector<float> square = scaled * scaled;
  Vector<float> small = square * 8.311530837e-5f - 8.128137564e-4f;
  small = small * square + 5.199770909e-3f;
  small = small * square - 2.685887925e-2f;
  small = small * square + 1.128368601e-1f;
  small = small * square - 3.761263192e-1f;
  small = small * square + 1.128379226f;
  small = 0.5f + 0.5f * small * scaled;

  const Vector<float> magnitude = std::bit_cast<Vector<float>>(std::bit_cast<Words>(scaled) & 0x7fffffffu);
  const Vector<float> four = Vector<float>{} + 4.0f;
  const Vector<float> t = choose(std::bit_cast<Words>(magnitude < four), magnitude, four);
  Vector<float> logarithm = t * 1.962298993e-4f - 3.045495133e-3f;
  logarithm = logarithm * t + 2.223392390e-2f;
  logarithm = logarithm * t - 1.039423868e-1f;
  logarithm = logarithm * t - 6.371735930e-1f;
  logarithm = logarithm * t - 1.127678871f;
  logarithm = logarithm * t - 1.952643070e-4f;
  const Vector<float> tail = 0.5f * exp_of_bounded_lanes(logarithm);
  const Vector<float> large = choose(std::bit_cast<Words>(z < 0.0f), tail, 1.0f - tail);

  const Vector<float> result = choose(std::bit_cast<Words>(magnitude < 0.93f), small, large);
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
