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
#include <memory>

#include "sample_pixel.h"

namespace stable_sam {
namespace {

// A call's arrays with their types, and the addresses within them.
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
      : call(from), inputs(from.inputs), shape(from.inputs.shape), samples(static_cast<PixelSample<T>*>(from.samples)),
        tap_products(static_cast<A*>(from.tap_products)), alpha_partials(static_cast<A*>(from.alpha_partials)) {}

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

template <typename T>
void locate_rows(const BackwardCall& call, int64_t first, int64_t last) {
  const BackwardArrays<T> arrays(call);
  for (int64_t row = first; row < last; ++row) {
    const int64_t prompt = row / arrays.shape.height, y = row % arrays.shape.height;
    for (int64_t x = 0; x < arrays.shape.width; ++x) {
      arrays.samples[row * arrays.shape.width + x] = locate_pixel<T>(call.inputs, prompt, y, x);
    }
  }
}

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
    for (int64_t y = first_y; y <= last_y; ++y) {
      const int64_t index = arrays.pixel_index(prompt, y, x);
      const PixelSample<T>& sample = arrays.samples[index];
      if (!touches(sample.y, static_cast<int32_t>(target_y))) continue;
      const Accumulator<T> weight = alpha.sampled * arrays.pixel_amplitude(prompt, y, x) *
                                    tap_weight(sample.y, static_cast<int32_t>(target_y));
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
void store_row(const Accumulator<T>* sums, int64_t elements, bool bypass_cache, T* target) {
  if (bypass_cache) {  // then a row is whole vectors
    for (int64_t i = 0; i < elements; i += kLanes<T>) store_bypassing_cache(target + i, load(sums + i));
    return;
  }
  for_each_vector<T>(elements, [&](int64_t i, auto load_some, auto store_some) {
    store_some(target + i, load_some(sums + i));
  });
}

// grad_identity of one row of one prompt (written, or added to `row_sums` where prompts are summed) and the
// row's share of the gradient of alpha_2.
template <typename T>
void gather_identity_row(const BackwardArrays<T>& arrays, int64_t prompt, int64_t y, Accumulator<T>* row_sums) {
  const SamplingShape& shape = arrays.shape;
  const Accumulator<T> weight = Alpha<T>(arrays.inputs, prompt).identity;
  const bool has_identity = arrays.inputs.identity != nullptr;
  T* written = row_sums || !arrays.call.grad_identity
                   ? nullptr
                   : static_cast<T*>(arrays.call.grad_identity) + (prompt * shape.height + y) * arrays.row_elements();
  Accumulator<T> share = 0;
  for (int64_t x = 0; x < shape.width; ++x) {
    const T* gradient = arrays.grad_output(prompt, y, x);
    const T* identity = arrays.identity(prompt, y, x);
    Vector<T> product{};
    const auto whole = [&](int64_t channel, auto load_some, auto store_some) {
      const Vector<T> incoming = load_some(gradient + channel);
      if (arrays.alpha_partials && has_identity) product += incoming * load_some(identity + channel);
      const int64_t position = x * shape.channels + channel;
      if (row_sums) store_some(row_sums + position, load_some(row_sums + position) + incoming * weight);
      else if (written) store_some(written + position, incoming * weight);
    };
    if (arrays.call.bypass_cache && written) {
      for_each_vector<T>(shape.channels, [&](int64_t channel, auto load_some, auto) {
        whole(channel, load_some, [](auto* target, auto values) { store_bypassing_cache(target, values); });
      });
    } else {
      for_each_vector<T>(shape.channels, whole);
    }
    share += sum_of_lanes(product);
  }
  if (arrays.alpha_partials) arrays.alpha_partials[(prompt * shape.height + y) * 2 + 1] = share;
}

// Rows of grad_features and grad_identity. Rows count B * H, or H where one image's gradient sums over prompts.
template <typename T>
void gather_rows(const BackwardCall& call, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const BackwardArrays<T> arrays(call);
  const SamplingShape& shape = arrays.shape;
  const bool all_prompts = call.sums_features() || call.sums_identity();
  const bool wants_products = call.tap_products != nullptr;
  const auto gather = call.grad_features == nullptr ? (arrays.has_channel_amplitude() ? gather_row<T, false, true, true>
                                                                                      : gather_row<T, false, true, false>)
                      : wants_products ? (arrays.has_channel_amplitude() ? gather_row<T, true, true, true>
                                                                         : gather_row<T, true, true, false>)
                                       : (arrays.has_channel_amplitude() ? gather_row<T, true, false, true>
                                                                         : gather_row<T, true, false, false>);
  const int64_t elements = arrays.row_elements();
  const std::unique_ptr<A[]> feature_sums(call.grad_features ? new A[elements] : nullptr);
  const std::unique_ptr<A[]> identity_sums(call.sums_identity() ? new A[elements] : nullptr);
  const auto store_features = [&](int64_t row) {
    store_row(feature_sums.get(), elements, call.bypass_cache, static_cast<T*>(call.grad_features) + row * elements);
  };

  for (int64_t row = first; row < last; ++row) {
    const int64_t y = row % shape.height;
    const int64_t first_prompt = all_prompts ? 0 : row / shape.height;
    const int64_t last_prompt = all_prompts ? shape.batch : first_prompt + 1;
    if (identity_sums) std::fill_n(identity_sums.get(), elements, A(0));
    if (call.sums_features()) std::fill_n(feature_sums.get(), elements, A(0));
    for (int64_t prompt = first_prompt; prompt < last_prompt; ++prompt) {
      if (call.grad_features && !call.sums_features()) std::fill_n(feature_sums.get(), elements, A(0));
      if (call.grad_features || wants_products) gather(arrays, prompt, y, feature_sums.get());
      if (call.grad_features && !call.sums_features()) store_features(prompt * shape.height + y);
      if (call.grad_identity || call.grad_alpha) gather_identity_row(arrays, prompt, y, identity_sums.get());
    }
    if (call.sums_features()) store_features(y);
    if (identity_sums) {
      store_row(identity_sums.get(), elements, call.bypass_cache, static_cast<T*>(call.grad_identity) + y * elements);
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
  T* target = static_cast<T*>(arrays.call.grad_amplitude) +
              arrays.pixel_index(prompt, y, x) * arrays.shape.channels;
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
      const A sampled = weights.top_left * d[0] + weights.top_right * d[1] + weights.bottom_left * d[2] +
                        weights.bottom_right * d[3];
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
