// Where one output pixel samples: shared by the forward and the backward kernels.
#pragma once

#include <algorithm>

#include "../bilinear.h"
#include "kernels.h"
#include "tanh.h"
#include "vector.h"

namespace stable_sam {
namespace {

template <typename T>
struct PixelSample {
  AxisSample<Accumulator<T>, int32_t> y, x;
};

// The samples of `columns` pixels of row y of one prompt, from column `first_x` on.
template <typename T>
inline void locate_columns(const SampleInputs& inputs, int64_t prompt, int64_t y, int64_t first_x, int64_t columns,
                           PixelSample<T>* samples) {
  using A = Accumulator<T>;
  const SamplingShape& shape = inputs.shape;
  const T* offsets = static_cast<const T*>(inputs.offsets) + prompt * shape.offsets_batch_stride +
                     y * shape.offsets_row_stride + first_x * shape.offsets_column_stride;
  const A max_offset = static_cast<A>(shape.max_offset);
  const auto height = static_cast<int32_t>(shape.height), width = static_cast<int32_t>(shape.width);
  for (int64_t first = 0; first < columns; first += kLanes<T>) {
    const int64_t count = std::min<int64_t>(kLanes<T>, columns - first);
    Vector<T> raw_x{}, raw_y{};
    for (int64_t lane = 0; lane < count; ++lane) {
      const T* offset = offsets + (first + lane) * shape.offsets_column_stride;
      raw_x[lane] = widen(offset[0]);
      raw_y[lane] = widen(offset[shape.offsets_axis_stride]);
    }
    const Vector<T> squashed_x = tanh_of_lanes(raw_x), squashed_y = tanh_of_lanes(raw_y);
    for (int64_t lane = 0; lane < count; ++lane) {
      const auto x = static_cast<int32_t>(first_x + first + lane);
      samples[first + lane] = {
          sample_squashed_axis<A, int32_t>(static_cast<int32_t>(y), squashed_y[lane], max_offset, height),
          sample_squashed_axis<A, int32_t>(x, squashed_x[lane], max_offset, width)};
    }
  }
}

// The samples of the pixels of row y of one prompt, [W].
template <typename T>
inline void locate_row(const SampleInputs& inputs, int64_t prompt, int64_t y, PixelSample<T>* samples) {
  locate_columns(inputs, prompt, y, 0, inputs.shape.width, samples);
}

// alpha of one prompt; (1, 0) where there is none, and no share of an identity that is not there.
template <typename T>
struct Alpha {
  Accumulator<T> sampled, identity;

  Alpha(const SampleInputs& inputs, int64_t prompt) : sampled(1), identity(0) {
    if (inputs.alpha == nullptr) return;
    const T* alpha = static_cast<const T*>(inputs.alpha) + prompt * inputs.shape.alpha_batch_stride;
    sampled = widen(alpha[0]);
    if (inputs.identity != nullptr) identity = widen(alpha[1]);
  }
};

// The C channels of one pixel of a dense [B or 1, H, W, C] tensor; null where the tensor is not there.
template <typename T>
inline const T* pixel(const void* tensor, const SamplingShape& shape, int64_t batch_stride, int64_t channels,
                      int64_t prompt, int64_t y, int64_t x) {
  if (tensor == nullptr) return nullptr;
  return static_cast<const T*>(tensor) + prompt * batch_stride + (y * shape.width + x) * channels;
}

// Calls body(channel, load, store) for whole vectors of channels and once more for the remaining few.
template <typename T, typename Body>
inline void for_each_vector(int64_t channels, const Body& body) {
  int64_t channel = 0;
  for (; channel + kLanes<T> <= channels; channel += kLanes<T>) {
    body(
        channel, [](const auto* source) { return load(source); },
        [](auto* target, Vector<T> values) { store(target, values); });
  }
  if (const int64_t rest = channels - channel; rest > 0) {
    body(
        channel, [rest](const auto* source) { return load_partial(source, rest); },
        [rest](auto* target, Vector<T> values) { store_partial(target, values, rest); });
  }
}

}  // namespace
}  // namespace stable_sam
