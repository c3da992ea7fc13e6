// Sampling location, bilinear weights and their gradients: the one place where they are written,
// for the CPU and for CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define STABLE_SAM_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels are compiled once per instruction set, and an out-of-line copy could be
// linked into code meant for an older processor.
#define STABLE_SAM_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace stable_sam {

// One axis of a sampling location clamp(p + max_offset * tanh(raw), 0, size - 1).
// Index is 64-bit on the host and 32-bit on the device, where registers are scarce.
template <typename T, typename Index = int64_t>
struct AxisSample {
  Index cell;  // floor of the location, always in [0, size - 1]
  Index next;  // the other tap, min(cell + 1, size - 1)
  T fraction;  // weight of `next`, in [0, 1); NaN for a NaN offset
  T slope;     // d location / d raw: 0 where the clamp binds
};

// The floor makes the derivative at integer locations the right-hand one. An infinite offset
// saturates at max_offset; a NaN offset keeps the undisplaced cell, so nothing outside the tensor is
// read, and its NaN fraction turns the pixel's output into NaN.
// `squashed` is tanh(raw), apart for kernels that take the tanh of many offsets at a time.
template <typename T, typename Index>
STABLE_SAM_HOST_DEVICE AxisSample<T, Index> sample_squashed_axis(Index position, T squashed, T max_offset, Index size) {
  const T wanted = static_cast<T>(position) + max_offset * squashed;
  const T last = static_cast<T>(size - 1);
  const bool inside = wanted >= T(0) && wanted <= last;
  const bool is_nan = wanted != wanted;
  const T location = wanted < T(0) ? T(0) : (wanted > last ? last : wanted);

  AxisSample<T, Index> sample;
  sample.cell = is_nan ? position : static_cast<Index>(std::floor(location));
  sample.next = sample.cell + 1 < size ? sample.cell + 1 : size - 1;
  sample.fraction = location - static_cast<T>(sample.cell);
  sample.slope = (inside || is_nan) ? max_offset * (T(1) - squashed * squashed) : T(0);
  return sample;
}

template <typename T, typename Index>
STABLE_SAM_HOST_DEVICE AxisSample<T, Index> sample_axis(Index position, T raw, T max_offset, Index size) {
  return sample_squashed_axis<T, Index>(position, std::tanh(raw), max_offset, size);
}

// Weights of the four taps: [cell_y][cell_x], [cell_y][next_x], [next_y][cell_x], [next_y][next_x].
template <typename T>
struct BilinearWeights {
  T top_left, top_right, bottom_left, bottom_right;
};

template <typename T, typename Index>
STABLE_SAM_HOST_DEVICE BilinearWeights<T> bilinear_weights(const AxisSample<T, Index>& y,
                                                           const AxisSample<T, Index>& x) {
  const T one = T(1);
  return {(one - y.fraction) * (one - x.fraction), (one - y.fraction) * x.fraction, y.fraction * (one - x.fraction),
          y.fraction * x.fraction};
}

// Derivatives of the interpolated value with respect to the two raw offsets, from four numbers d that
// are, for each tap, the dot product over channels of the incoming gradient with that tap's values.
template <typename T, typename Index>
STABLE_SAM_HOST_DEVICE T offset_gradient_x(const AxisSample<T, Index>& y, const AxisSample<T, Index>& x, T d_top_left,
                                           T d_top_right, T d_bottom_left, T d_bottom_right) {
  return x.slope * ((T(1) - y.fraction) * (d_top_right - d_top_left) + y.fraction * (d_bottom_right - d_bottom_left));
}

template <typename T, typename Index>
STABLE_SAM_HOST_DEVICE T offset_gradient_y(const AxisSample<T, Index>& y, const AxisSample<T, Index>& x, T d_top_left,
                                           T d_top_right, T d_bottom_left, T d_bottom_right) {
  return y.slope * ((T(1) - x.fraction) * (d_bottom_left - d_top_left) + x.fraction * (d_bottom_right - d_top_right));
}

// Whether a sampling location has `target` among its two taps along one axis. A gather over candidates
// asks this along both axes before it multiplies weights: a NaN weight along one axis must not reach a
// target that is no tap along the other.
template <typename T, typename Index>
STABLE_SAM_HOST_DEVICE bool touches(const AxisSample<T, Index>& sample, Index target) {
  return target == sample.cell || target == sample.next;
}

// Weight with which a sampling location contributes to the tap `target` along one axis. Both taps
// coincide at the far border, where both weights count.
template <typename T, typename Index>
STABLE_SAM_HOST_DEVICE T tap_weight(const AxisSample<T, Index>& sample, Index target) {
  const T lower = target == sample.cell ? T(1) - sample.fraction : T(0);
  return target == sample.next ? lower + sample.fraction : lower;
}

// How far a target pixel can lie from a pixel that samples it: the gather window of the backward pass
// is (2 * radius + 1) squared. At least 1, because a NaN location has the next pixel among its taps
// whatever the maximal offset; bounded, so that the caller's arithmetic cannot overflow.
STABLE_SAM_HOST_DEVICE int64_t gather_radius(double max_offset) {
  const double largest = 1 << 28;
  const double magnitude = max_offset < 0 ? -max_offset : max_offset;
  const double radius = std::ceil(magnitude < largest ? magnitude : largest);
  return static_cast<int64_t>(radius < 1 ? 1 : radius);
}

}  // namespace stable_sam
