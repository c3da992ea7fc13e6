// Forward kernel: every output pixel blends four rows of channels, one vector of channels at a time.
#pragma once

#include <memory>

#include "sample_pixel.h"

namespace stable_sam {
namespace {

// `Store` writes whole vectors; the partial one at the end always goes through the caches.
template <typename T, bool has_identity, bool has_channel_amplitude, bool bypass_cache>
inline void blend_pixel(const T* const taps[4], const BilinearWeights<Accumulator<T>>& weights, const T* amplitude,
                        const T* identity, Accumulator<T> identity_weight, int64_t channels, T* output) {
  const auto blend = [&](int64_t channel, auto load_some) {
    Vector<T> value = load_some(taps[0] + channel) * weights.top_left;
    value += load_some(taps[1] + channel) * weights.top_right;
    value += load_some(taps[2] + channel) * weights.bottom_left;
    value += load_some(taps[3] + channel) * weights.bottom_right;
    if constexpr (has_channel_amplitude) value *= load_some(amplitude + channel);
    if constexpr (has_identity) value += load_some(identity + channel) * identity_weight;
    return value;
  };
  int64_t channel = 0;
  for (; channel + kLanes<T> <= channels; channel += kLanes<T>) {
    const Vector<T> value = blend(channel, [](const T* source) { return load(source); });
    if constexpr (bypass_cache)
      store_bypassing_cache(output + channel, value);
    else
      store(output + channel, value);
  }
  if (const int64_t rest = channels - channel; rest > 0) {
    const Vector<T> value = blend(channel, [rest](const T* source) { return load_partial(source, rest); });
    store_partial(output + channel, value, rest);
  }
}

template <typename T, bool has_identity, bool has_channel_amplitude, bool bypass_cache>
void sample_rows_as(const ForwardCall& call, int64_t first, int64_t last) {
  const SampleInputs& inputs = call.inputs;
  const SamplingShape& shape = inputs.shape;
  const std::unique_ptr<PixelSample<T>[]> samples(new PixelSample<T>[shape.width]);
  for (int64_t row = first; row < last; ++row) {
    const int64_t prompt = row / shape.height, y = row % shape.height;
    const Alpha<T> alpha(inputs, prompt);
    const auto feature = [&](int64_t tap_y, int64_t tap_x) {
      return pixel<T>(inputs.features, shape, shape.features_batch_stride, shape.channels, prompt, tap_y, tap_x);
    };
    locate_row(inputs, prompt, y, samples.get());
    for (int64_t x = 0; x < shape.width; ++x) {
      const PixelSample<T>& sample = samples[x];
      const T* const taps[4] = {feature(sample.y.cell, sample.x.cell), feature(sample.y.cell, sample.x.next),
                                feature(sample.y.next, sample.x.cell), feature(sample.y.next, sample.x.next)};
      const T* amplitude =
          pixel<T>(inputs.amplitude, shape, shape.amplitude_batch_stride, shape.amplitude_channels, prompt, y, x);
      Accumulator<T> scale = alpha.sampled;
      if (!has_channel_amplitude && inputs.amplitude != nullptr) scale *= widen(*amplitude);
      BilinearWeights<Accumulator<T>> weights = bilinear_weights(sample.y, sample.x);
      weights.top_left *= scale;
      weights.top_right *= scale;
      weights.bottom_left *= scale;
      weights.bottom_right *= scale;
      const T* identity = pixel<T>(inputs.identity, shape, shape.identity_batch_stride, shape.channels, prompt, y, x);
      T* output = static_cast<T*>(call.output) + (row * shape.width + x) * shape.channels;
      blend_pixel<T, has_identity, has_channel_amplitude, bypass_cache>(taps, weights, amplitude, identity,
                                                                        alpha.identity, shape.channels, output);
    }
  }
  if constexpr (bypass_cache) finish_bypassing_stores();
}

template <typename T>
void sample_rows(const ForwardCall& call, int64_t first, int64_t last) {
  const bool has_identity = call.inputs.alpha != nullptr && call.inputs.identity != nullptr;
  const bool has_channel_amplitude = call.inputs.shape.amplitude_channels > 1;
  const auto run = [&](auto identity, auto amplitude, auto bypass) {
    sample_rows_as<T, identity.value, amplitude.value, bypass.value>(call, first, last);
  };
  const auto choose_bypass = [&](auto identity, auto amplitude) {
    call.bypass_cache ? run(identity, amplitude, std::true_type{}) : run(identity, amplitude, std::false_type{});
  };
  const auto choose_amplitude = [&](auto identity) {
    has_channel_amplitude ? choose_bypass(identity, std::true_type{}) : choose_bypass(identity, std::false_type{});
  };
  has_identity ? choose_amplitude(std::true_type{}) : choose_amplitude(std::false_type{});
}

}  // namespace
}  // namespace stable_sam
