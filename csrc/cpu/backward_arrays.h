// The arrays of a backward call with their types, and the addresses within them.
#pragma once

#include "sample_pixel.h"

namespace stable_sam {
namespace {

template <typename T>
struct BackwardArrays {
  using A = Accumulator<T>;
  const BackwardCall& call;
  const SampleInputs& inputs;
  const SamplingShape& shape;
  PixelSample<T>* samples;
  A* tap_products;
  A* alpha_partials;

  explicit BackwardArrays(const BackwardCall& from)
      : call(from),
        inputs(from.inputs),
        shape(from.inputs.shape),
        samples(static_cast<PixelSample<T>*>(from.samples)),
        tap_products(static_cast<A*>(from.tap_products)),
        alpha_partials(static_cast<A*>(from.alpha_partials)) {}

  int64_t pixel_index(int64_t prompt, int64_t y, int64_t x) const {
    return (prompt * shape.height + y) * shape.width + x;
  }
  int64_t row_elements() const { return shape.width * shape.channels; }
  const T* grad_output(int64_t prompt, int64_t y, int64_t x) const {
    return static_cast<const T*>(call.grad_output) + pixel_index(prompt, y, x) * shape.channels;
  }
  const T* feature(int64_t prompt, int64_t y, int64_t x) const {
    return pixel<T>(inputs.features, shape, shape.features_batch_stride, shape.channels, prompt, y, x);
  }
  const T* identity(int64_t prompt, int64_t y, int64_t x) const {
    return pixel<T>(inputs.identity, shape, shape.identity_batch_stride, shape.channels, prompt, y, x);
  }
  const T* amplitude(int64_t prompt, int64_t y, int64_t x) const {
    return pixel<T>(inputs.amplitude, shape, shape.amplitude_batch_stride, shape.amplitude_channels, prompt, y, x);
  }
  bool has_channel_amplitude() const { return inputs.amplitude != nullptr && shape.amplitude_channels > 1; }
  // The factor on all channels of a pixel; an amplitude for each channel is multiplied elsewhere.
  A pixel_amplitude(int64_t prompt, int64_t y, int64_t x) const {
    return inputs.amplitude == nullptr || has_channel_amplitude() ? A(1) : widen(*amplitude(prompt, y, x));
  }
};

}  // namespace
}  // namespace stable_sam
