// Where one output pixel samples: shared by the forward and the backward kernels.
#pragma once

#include "../bilinear.h"
#include "kernels.h"
#include "vector.h"

namespace stable_sam {
namespace {

template <typename T>
struct PixelSample {
  AxisSample<Accumulator<T>, int32_t> y, x;
};

template <typename T>
inline PixelSample<T> locate_pixel(const SampleInputs& inputs, int64_t prompt, int64_t y, int64_t x) {
  using A = Accumulator<T>;
  const SamplingShape& shape = inputs.shape;
  const T* offset = static_cast<const T*>(inputs.offsets) + prompt * shape.offsets_batch_stride +
                    y * shape.offsets_row_stride + x * shape.offsets_column_stride;
  const A max_offset = static_cast<A>(shape.max_offset);
  return {sample_axis<A, int32_t>(static_cast<int32_t>(y), widen(offset[shape.offsets_axis_stride]), max_offset,
                                  static_cast<int32_t>(shape.height)),
          sample_axis<A, int32_t>(static_cast<int32_t>(x), widen(offset[0]), max_offset,
                                  static_cast<int32_t>(shape.width))};
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

// The C channels of one pixel of a dense [B or 1, H, W, C] tensor.
template <typename T>
inline const T* pixel(const void* tensor, const SamplingShape& shape, int64_t batch_stride, int64_t channels,
                      int64_t prompt, int64_t y, int64_t x) {
  return static_cast<const T*>(tensor) + prompt * batch_stride + (y * shape.width + x) * channels;
}

// Calls body(channel, load, store) for whole vectors of channels and once more for the remaining few.
template <typename T, typename Body>
inline void for_each_vector(int64_t channels, const Body& body) {
  int64_t channel = 0;
  for (; channel + kLanes<T> <= channels; channel += kLanes<T>) {
    body(channel, [](const auto* source) { return load(source); },
         [](auto* target, Vector<T> values) { store(target, values); });
  }
  if (const int64_t rest = channels - channel; rest > 0) {
    body(channel, [rest](const auto* source) { return load_partial(source, rest); },
         [rest](auto* target, Vector<T> values) { store_partial(target, values, rest); });
  }
}

}  // namespace
}  // namespace stable_sam
