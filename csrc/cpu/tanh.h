// tanh of a vector of numbers. The C library takes one at a time, which would cost a quarter of the forward pass.
#pragma once

#include <cmath>

#include "exponential.h"

namespace stable_sam {
namespace {

// Within two units in the last place. Below 0.625 an odd polynomial (Cephes' tanhf), above 1 - 2 / (e^2|x| + 1),
// which is 1 from 10 on; NaN stays NaN.
inline Vector<float> tanh_of_lanes(Vector<float> x) {
  const Words sign = std::bit_cast<Words>(x) & 0x80000000u;
  const Vector<float> magnitude = std::bit_cast<Vector<float>>(std::bit_cast<Words>(x) & 0x7fffffffu);
  const Vector<float> square = x * x;
  Vector<float> polynomial = square * -5.70498872745e-3f + 2.06390887954e-2f;
  polynomial = polynomial * square - 5.37397155531e-2f;
  polynomial = polynomial * square + 1.33314422036e-1f;
  polynomial = polynomial * square - 3.33332819422e-1f;
  const Vector<float> small = polynomial * square * magnitude + magnitude;

  const Vector<float> ten = Vector<float>{} + 10.0f;
  const Vector<float> bounded = choose(std::bit_cast<Words>(magnitude < ten), magnitude, ten);
  const Vector<float> large = 1.0f - 2.0f / (exp_of_bounded_lanes(bounded + bounded) + 1.0f);
  const Words result = std::bit_cast<Words>(choose(std::bit_cast<Words>(magnitude < 0.625f), small, large)) | sign;
  return choose(std::bit_cast<Words>(x == x), std::bit_cast<Vector<float>>(result), x);
}

inline Vector<double> tanh_of_lanes(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::tanh(x[lane]);
  return x;
}

}  // namespace
}  // namespace stable_sam
