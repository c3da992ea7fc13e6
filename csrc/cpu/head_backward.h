// Backward of offset_head. A task walks over bands of rows; for each it computes the hidden channels again, also those
// of the rows around from which the gradient of its features comes, so that no two tasks write one address. Sums for
// the parameters are kept by each task and added in one order afterwards.
#pragma once

#include <algorithm>

#include "head_forward.h"

namespace stable_sam {
namespace {

// The gradient with respect to the convolution's result at one pixel, from its normalised hidden channels `hidden` and
// the gradients of its two offsets; adds the pixel's share to the sums of the parameters behind it (unless null).
template <typename A>
void backward_pixel(const HeadShape& shape, const HeadParameters<A>& parameters, const A* hidden, A scale, A gradient_x,
                    A gradient_y, const HeadParameters<A>* sums, A* gradient) {
  Vector<A> sum{}, product{};
  for (int64_t channel = 0; channel < shape.padded_channels(); channel += kLanes<A>) {
    const auto add = [channel](A* target, Vector<A> share) { store(target + channel, load(target + channel) + share); };
    const Vector<A> normalised = load(hidden + channel);
    const Vector<A> weight = load(parameters.norm_weight() + channel);
    const Vector<A> z = normalised * weight + load(parameters.norm_bias() + channel);
    const Vector<A> below = normal_cdf(z);
    const Vector<A> grad_activated =
        gradient_x * load(parameters.pointwise(0) + channel) + gradient_y * load(parameters.pointwise(1) + channel);
    const Vector<A> grad_z = grad_activated * (below + z * normal_pdf(z));
    if (sums != nullptr) {
      const Vector<A> activated = z * below;
      add(sums->pointwise(0), gradient_x * activated);
      add(sums->pointwise(1), gradient_y * activated);
      add(sums->norm_weight(), grad_z * normalised);
      add(sums->norm_bias(), grad_z);
    }
    const Vector<A> grad_normalised = grad_z * weight;
    sum += grad_normalised;
    product += grad_normalised * normalised;
    store(gradient + channel, grad_normalised);
  }
  const A mean = sum_of_lanes(sum) / static_cast<A>(shape.channels);
  const A slope = sum_of_lanes(product) / static_cast<A>(shape.channels);
  for (int64_t channel = 0; channel < shape.padded_channels(); channel += kLanes<A>) {
    const Vector<A> centred = load(gradient + channel) - mean - load(hidden + channel) * slope;
    store(gradient + channel, scale * centred * load(parameters.is_channel() + channel));
  }
  if (sums != nullptr) {
    sums->pointwise_bias()[0] += gradient_x;
    sums->pointwise_bias()[1] += gradient_y;
  }
}

// Stores the gradient of one row of features, gathered from the hidden gradients around it.
template <typename T, typename A>
void store_feature_gradients(const PaddedRows<A>& gradients, const HeadParameters<A>& parameters, int64_t y, A* block,
                             T* row) {
  const HeadShape& shape = gradients.shape;
  const auto weight_of = [&](int64_t tap) { return parameters.depthwise(shape.taps() - 1 - tap); };
  for (int64_t x = 0; x < shape.width; x += kBlock) {
    convolve_block<A>(gradients, y, x, weight_of, nullptr, block);
    for (int64_t p = 0; p < std::min(kBlock, shape.width - x); ++p) {
      const A* source = block + p * shape.pixel_stride();
      T* target = row + (x + p) * shape.channels;
      for_each_vector<T>(shape.channels, [&](int64_t channel, auto, auto store_some) {
        store_some(target + channel, load(source + channel));
      });
    }
  }
}

template <typename T>
void backward_band(const HeadBackwardCall& call, const HeadParameters<Accumulator<T>>& parameters, int64_t band,
                   const HeadParameters<Accumulator<T>>* sums) {
  using A = Accumulator<T>;
  const HeadCall& forward = call.forward;
  const HeadShape& shape = forward.shape;
  const int64_t image = band / forward.bands_per_image(), plane = shape.height * shape.width;
  const int64_t first_y = band % forward.bands_per_image() * forward.rows_per_band;
  const int64_t last_y = std::min(shape.height, first_y + forward.rows_per_band);
  const int64_t halo = call.grad_features == nullptr ? 0 : shape.radius();
  const PaddedRows<A> rows(shape, first_y - halo - shape.radius(), last_y + halo + shape.radius());
  const PaddedRows<A> gradients(shape, first_y - halo, last_y + halo);
  const AlignedArray<A> hidden(kBlock * shape.pixel_stride());
  A scales[kBlock];
  rows.copy_from(static_cast<const T*>(forward.features) + image * plane * shape.channels);

  const T* grad_output = static_cast<const T*>(call.grad_output) + image * 2 * plane;
  for (int64_t y = std::max<int64_t>(0, first_y - halo); y < std::min(shape.height, last_y + halo); ++y) {
    const bool is_own = y >= first_y && y < last_y && sums != nullptr;
    for (int64_t x = 0; x < shape.width; x += kBlock) {
      const int64_t count = std::min(kBlock, shape.width - x);
      hidden_block(rows, parameters, y, x, count, hidden.data, scales);
      for (int64_t p = 0; p < count; ++p) {
        const T* incoming = grad_output + y * shape.width + x + p;
        backward_pixel(shape, parameters, hidden.data + p * shape.pixel_stride(), scales[p], widen(incoming[0]),
                       widen(incoming[plane]), is_own ? sums : nullptr, gradients.pixel(y, x + p));
      }
      if (is_own) add_weight_gradients(rows, y, x, gradients.pixel(y, x), *sums);
    }
  }
  if (call.grad_features == nullptr) return;
  T* target = static_cast<T*>(call.grad_features) + image * plane * shape.channels;
  for (int64_t y = first_y; y < last_y; ++y) {
    store_feature_gradients(gradients, parameters, y, hidden.data, target + y * shape.width * shape.channels);
  }
}

// Tasks [first, last).
template <typename T>
void head_backward(const HeadBackwardCall& call, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const HeadShape& shape = call.forward.shape;
  const HeadParameters<A> parameters(shape, static_cast<A*>(call.forward.parameters));
  for (int64_t task = first; task < last; ++task) {
    const int64_t count = shape.parameter_count();
    const HeadParameters<A> sums(shape, static_cast<A*>(call.partials) + (call.partials ? task * count : 0));
    if (call.partials) std::fill_n(sums.data, count, A(0));
    for (int64_t band = call.first_band(task); band < call.first_band(task + 1); ++band) {
      backward_band<T>(call, parameters, band, call.partials ? &sums : nullptr);
    }
  }
}

}  // namespace
}  // namespace stable_sam
