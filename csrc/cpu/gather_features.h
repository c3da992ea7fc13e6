// One row of grad_features: visits of all pixels that sample from it, and their products with its features.
#pragma once

#include <algorithm>

#include "backward_arrays.h"

namespace stable_sam {
namespace {

// One visit of a sampling pixel to a row it touches: its gradient goes to the row's two taps, and is
// multiplied with their features.
template <typename T>
struct Visit {
  const T *gradient, *amplitude, *left_feature, *right_feature;
  Accumulator<T>*left_sum, *right_sum;
  Accumulator<T> left_weight, right_weight;
  Accumulator<T> left_product, right_product;  // results
};

template <typename T, bool wants_features, bool wants_products, bool has_channel_amplitude>
inline void visit_row(Visit<T>& visit, int64_t channels) {
  Vector<T> left_product{}, right_product{};
  for_each_vector<T>(channels, [&](int64_t channel, auto load_some, auto store_some) {
    Vector<T> gradient = load_some(visit.gradient + channel);
    if constexpr (has_channel_amplitude) gradient *= load_some(visit.amplitude + channel);
    if constexpr (wants_products) {
      left_product += gradient * load_some(visit.left_feature + channel);
      right_product += gradient * load_some(visit.right_feature + channel);
    }
    if constexpr (wants_features) {
      // In this order: at the far border both taps are one pixel.
      Accumulator<T>* left = visit.left_sum + channel;
      store_some(left, load_some(left) + gradient * visit.left_weight);
      Accumulator<T>* right = visit.right_sum + channel;
      store_some(right, load_some(right) + gradient * visit.right_weight);
    }
  });
  visit.left_product = sum_of_lanes(left_product);
  visit.right_product = sum_of_lanes(right_product);
}

// Of all rows that a task reads only the window's last and the target's own are new to the caches.
constexpr int64_t kPrefetchedPixels = 3;

template <typename T>
inline void prefetch_pixel(const T* pixel, int64_t channels) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  for (int64_t channel = 0; channel < channels; channel += kCacheLine) __builtin_prefetch(pixel + channel);
}

// All visits of one prompt's pixels to row `target_y`, added to `row_sums` [W, C].
template <typename T, bool wants_features, bool wants_products, bool has_channel_amplitude>
void gather_row(const BackwardArrays<T>& arrays, int64_t prompt, int64_t target_y, Accumulator<T>* row_sums) {
  const SamplingShape& shape = arrays.shape;
  const Alpha<T> alpha(arrays.inputs, prompt);
  const int64_t radius = gather_radius(shape.max_offset);
  // A pixel whose location is exactly `radius` below has row `target_y` as its next tap, with weight 0.
  const int64_t first_y = std::max<int64_t>(0, target_y - radius - 1);
  const int64_t last_y = std::min<int64_t>(shape.height - 1, target_y + radius);
  for (int64_t x = 0; x < shape.width; ++x) {  // columns outside: taps of one column share the caches
    if (x + kPrefetchedPixels < shape.width) {
      prefetch_pixel(arrays.grad_output(prompt, last_y, x + kPrefetchedPixels), shape.channels);
      prefetch_pixel(arrays.feature(prompt, target_y, x + kPrefetchedPixels), shape.channels);
    }
    for (int64_t y = first_y; y <= last_y; ++y) {
      const int64_t index = arrays.pixel_index(prompt, y, x);
      const PixelSample<T>& sample = arrays.samples[index];
      if (!touches(sample.y, static_cast<int32_t>(target_y))) continue;
      const Accumulator<T> weight =
          alpha.sampled * arrays.pixel_amplitude(prompt, y, x) * tap_weight(sample.y, static_cast<int32_t>(target_y));
      Visit<T> visit{};
      visit.gradient = arrays.grad_output(prompt, y, x);
      visit.amplitude = arrays.amplitude(prompt, y, x);
      visit.left_feature = arrays.feature(prompt, target_y, sample.x.cell);
      visit.right_feature = arrays.feature(prompt, target_y, sample.x.next);
      if constexpr (wants_features) {
        visit.left_sum = row_sums + sample.x.cell * shape.channels;
        visit.right_sum = row_sums + sample.x.next * shape.channels;
        visit.left_weight = weight * (1 - sample.x.fraction);
        visit.right_weight = weight * sample.x.fraction;
      }
      visit_row<T, wants_features, wants_products, has_channel_amplitude>(visit, shape.channels);
      if constexpr (wants_products) {
        Accumulator<T>* products = arrays.tap_products + index * 4;
        if (sample.y.cell == target_y) products[0] = visit.left_product, products[1] = visit.right_product;
        if (sample.y.next == target_y) products[2] = visit.left_product, products[3] = visit.right_product;
      }
    }
  }
}

template <typename T>
auto choose_gather_row(const BackwardArrays<T>& arrays) {
  const bool wants_products = arrays.tap_products != nullptr;
  const bool channel_amplitude = arrays.has_channel_amplitude();
  if (arrays.call.grad_features == nullptr) {
    return channel_amplitude ? gather_row<T, false, true, true> : gather_row<T, false, true, false>;
  }
  if (wants_products) return channel_amplitude ? gather_row<T, true, true, true> : gather_row<T, true, true, false>;
  return channel_amplitude ? gather_row<T, true, false, true> : gather_row<T, true, false, false>;
}

}  // namespace
}  // namespace stable_sam
