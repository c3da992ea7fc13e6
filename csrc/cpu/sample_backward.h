// Backward kernels. The gradient of the features is gathered, not scattered: a task owns one row of it and
// visits every pixel that samples from that row, which lie within gather_radius of it because offsets are
// bounded. So no two tasks write one address, nothing is atomic, and sums have one order whatever the threads.
//
//   locate   where every pixel samples, once (tanh is costly)
//   gather   rows of grad_features and grad_identity; products of the gradient with the taps of each pixel
//   finish   grad_offsets, grad_amplitude and a row's share of grad_alpha, from those products
//   reduce   grad_alpha from the shares of all rows
#pragma once

#include <algorithm>

#include "gather_features.h"
#include "gather_identity.h"

namespace stable_sam {
namespace {

template <typename T>
void locate_rows(const BackwardCall& call, int64_t first, int64_t last) {
  const BackwardArrays<T> arrays(call);
  for (int64_t row = first; row < last; ++row) {
    const int64_t prompt = row / arrays.shape.height, y = row % arrays.shape.height;
    locate_row(call.inputs, prompt, y, arrays.samples + row * arrays.shape.width);
  }
}

template <typename T>
void store_row(const Accumulator<T>* sums, int64_t elements, bool bypass_cache, T* target) {
  if (bypass_cache) {  // then a row is whole vectors
    for (int64_t i = 0; i < elements; i += kLanes<T>) store_bypassing_cache(target + i, load(sums + i));
    return;
  }
  for_each_vector<T>(elements,
                     [&](int64_t i, auto load_some, auto store_some) { store_some(target + i, load_some(sums + i)); });
}

// Rows of grad_features and grad_identity. Rows count B * H, or H where one image's gradient sums over prompts.
template <typename T>
void gather_rows(const BackwardCall& call, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const BackwardArrays<T> arrays(call);
  const SamplingShape& shape = arrays.shape;
  const bool all_prompts = call.sums_features() || call.sums_identity();
  const auto gather = choose_gather_row(arrays);
  const auto gather_identity = call.grad_identity == nullptr ? gather_identity_row<T, IdentityGradient::kNone>
                               : call.sums_identity()        ? gather_identity_row<T, IdentityGradient::kSummed>
                               : call.bypass_cache ? gather_identity_row<T, IdentityGradient::kStoredAroundCaches>
                                                   : gather_identity_row<T, IdentityGradient::kStored>;
  const int64_t elements = arrays.row_elements();
  const AlignedArray<A> feature_sums(call.grad_features ? elements : 0);
  const AlignedArray<A> identity_sums(call.sums_identity() ? elements : 0);
  const auto store_features = [&](int64_t row) {
    store_row(feature_sums.data, elements, call.bypass_cache, static_cast<T*>(call.grad_features) + row * elements);
  };

  for (int64_t row = first; row < last; ++row) {
    const int64_t y = row % shape.height;
    const int64_t first_prompt = all_prompts ? 0 : row / shape.height;
    const int64_t last_prompt = all_prompts ? shape.batch : first_prompt + 1;
    if (call.sums_identity()) std::fill_n(identity_sums.data, elements, A(0));
    if (call.sums_features()) std::fill_n(feature_sums.data, elements, A(0));
    for (int64_t prompt = first_prompt; prompt < last_prompt; ++prompt) {
      if (call.grad_features && !call.sums_features()) std::fill_n(feature_sums.data, elements, A(0));
      if (call.grad_features || call.tap_products) gather(arrays, prompt, y, feature_sums.data);
      if (call.grad_features && !call.sums_features()) store_features(prompt * shape.height + y);
      if (call.grad_identity || call.grad_alpha) gather_identity(arrays, prompt, y, identity_sums.data);
    }
    if (call.sums_features()) store_features(y);
    if (call.sums_identity()) {
      store_row(identity_sums.data, elements, call.bypass_cache, static_cast<T*>(call.grad_identity) + y * elements);
    }
  }
  if (call.bypass_cache) finish_bypassing_stores();
}

template <typename T>
void finish_channel_amplitude(const BackwardArrays<T>& arrays, const PixelSample<T>& sample, Accumulator<T> scale,
                              int64_t prompt, int64_t y, int64_t x) {
  const auto weights = bilinear_weights(sample.y, sample.x);
  const T* top_left = arrays.feature(prompt, sample.y.cell, sample.x.cell);
  const T* top_right = arrays.feature(prompt, sample.y.cell, sample.x.next);
  const T* bottom_left = arrays.feature(prompt, sample.y.next, sample.x.cell);
  const T* bottom_right = arrays.feature(prompt, sample.y.next, sample.x.next);
  const T* gradient = arrays.grad_output(prompt, y, x);
  T* target = static_cast<T*>(arrays.call.grad_amplitude) + arrays.pixel_index(prompt, y, x) * arrays.shape.channels;
  for_each_vector<T>(arrays.shape.channels, [&](int64_t channel, auto load_some, auto store_some) {
    Vector<T> sampled = load_some(top_left + channel) * weights.top_left;
    sampled += load_some(top_right + channel) * weights.top_right;
    sampled += load_some(bottom_left + channel) * weights.bottom_left;
    sampled += load_some(bottom_right + channel) * weights.bottom_right;
    store_some(target + channel, load_some(gradient + channel) * sampled * scale);
  });
}

template <typename T>
void finish_rows(const BackwardCall& call, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const BackwardArrays<T> arrays(call);
  const SamplingShape& shape = arrays.shape;
  const int64_t plane = shape.height * shape.width;
  for (int64_t row = first; row < last; ++row) {
    const int64_t prompt = row / shape.height, y = row % shape.height;
    const A alpha = Alpha<T>(arrays.inputs, prompt).sampled;
    A share = 0;
    for (int64_t x = 0; x < shape.width; ++x) {
      const int64_t index = arrays.pixel_index(prompt, y, x);
      const PixelSample<T>& sample = arrays.samples[index];
      if (call.grad_amplitude && arrays.has_channel_amplitude()) {
        finish_channel_amplitude(arrays, sample, alpha, prompt, y, x);
      }
      if (call.tap_products == nullptr) continue;
      const A* d = arrays.tap_products + index * 4;
      const A pixel_amplitude = arrays.pixel_amplitude(prompt, y, x);
      if (call.grad_offsets) {
        T* target = static_cast<T*>(call.grad_offsets) + prompt * 2 * plane + y * shape.width + x;
        const A scale = alpha * pixel_amplitude;
        target[0] = narrow<T>(scale * offset_gradient_x(sample.y, sample.x, d[0], d[1], d[2], d[3]));
        target[plane] = narrow<T>(scale * offset_gradient_y(sample.y, sample.x, d[0], d[1], d[2], d[3]));
      }
      const auto weights = bilinear_weights(sample.y, sample.x);
      const A sampled =
          weights.top_left * d[0] + weights.top_right * d[1] + weights.bottom_left * d[2] + weights.bottom_right * d[3];
      if (call.grad_amplitude && !arrays.has_channel_amplitude()) {
        static_cast<T*>(call.grad_amplitude)[index] = narrow<T>(alpha * sampled);
      }
      share += pixel_amplitude * sampled;
    }
    if (call.alpha_partials) arrays.alpha_partials[row * 2] = share;
  }
}

// Prompts [first, last): the rows' shares of grad_alpha summed in order, in double.
template <typename T>
void reduce_alpha(const BackwardCall& call, int64_t first, int64_t last) {
  const BackwardArrays<T> arrays(call);
  for (int64_t prompt = first; prompt < last; ++prompt) {
    double sums[2] = {0, 0};
    for (int64_t y = 0; y < arrays.shape.height; ++y) {
      for (int share = 0; share < 2; ++share) {
        sums[share] += arrays.alpha_partials[(prompt * arrays.shape.height + y) * 2 + share];
      }
    }
    T* target = static_cast<T*>(call.grad_alpha) + prompt * 2;
    for (int share = 0; share < 2; ++share) target[share] = narrow<T>(static_cast<Accumulator<T>>(sums[share]));
  }
}

}  // namespace
}  // namespace stable_sam
