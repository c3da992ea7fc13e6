// Forward of offset_head, and what its backward computes again: convolution, norm and GELU of a few pixels at a time.
#pragma once

#include <algorithm>
#include <cmath>

#include "gelu.h"
#include "head_convolution.h"

namespace stable_sam {
namespace {

// Normalises one pixel's hidden channels in place, in two passes as its variance may be small beside its mean. Returns
// 1 / standard deviation.
template <typename A>
A normalise_pixel(const HeadShape& shape, const HeadParameters<A>& parameters, A* hidden) {
  const int64_t channels = shape.padded_channels();
  Vector<A> sum{}, squares{};
  for (int64_t channel = 0; channel < channels; channel += kLanes<A>) sum += load(hidden + channel);
  const A mean = sum_of_lanes(sum) / static_cast<A>(shape.channels);
  for (int64_t channel = 0; channel < channels; channel += kLanes<A>) {
    const Vector<A> centred = (load(hidden + channel) - mean) * load(parameters.is_channel() + channel);
    squares += centred * centred;
    store(hidden + channel, centred);
  }
  const A variance = sum_of_lanes(squares) / static_cast<A>(shape.channels);
  const A scale = 1 / std::sqrt(variance + static_cast<A>(shape.eps));
  for (int64_t channel = 0; channel < channels; channel += kLanes<A>) {
    store(hidden + channel, load(hidden + channel) * scale);
  }
  return scale;
}

// Normalised hidden channels of kBlock pixels; the norm's scale of the `count` that lie in the image.
template <typename A>
void hidden_block(const PaddedRows<A>& rows, const HeadParameters<A>& parameters, int64_t y, int64_t x, int64_t count,
                  A* hidden, A* scales) {
  const auto weight_of = [&](int64_t tap) { return parameters.depthwise(tap); };
  convolve_block(rows, y, x, weight_of, parameters.depthwise_bias(), hidden);
  for (int64_t p = 0; p < count; ++p) {
    scales[p] = normalise_pixel(rows.shape, parameters, hidden + p * rows.shape.pixel_stride());
  }
}

// The two raw offsets of one pixel from its normalised hidden channels.
template <typename T, typename A>
void project_pixel(const HeadShape& shape, const HeadParameters<A>& parameters, const A* hidden, T* output_x,
                   T* output_y) {
  Vector<A> sum_x{}, sum_y{};
  for (int64_t channel = 0; channel < shape.padded_channels(); channel += kLanes<A>) {
    const Vector<A> z =
        load(hidden + channel) * load(parameters.norm_weight() + channel) + load(parameters.norm_bias() + channel);
    const Vector<A> activated = z * normal_cdf(z);
    sum_x += activated * load(parameters.pointwise(0) + channel);
    sum_y += activated * load(parameters.pointwise(1) + channel);
  }
  *output_x = narrow<T>(sum_of_lanes(sum_x) + parameters.pointwise_bias()[0]);
  *output_y = narrow<T>(sum_of_lanes(sum_y) + parameters.pointwise_bias()[1]);
}

// Bands [first, last) of all B images.
template <typename T>
void head_forward(const HeadCall& call, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const HeadShape& shape = call.shape;
  const HeadParameters<A> parameters(shape, static_cast<A*>(call.parameters));
  const int64_t plane = shape.height * shape.width;
  const AlignedArray<A> hidden(kBlock * shape.pixel_stride());
  A scales[kBlock];
  for (int64_t band = first; band < last; ++band) {
    const int64_t image = band / call.bands_per_image();
    const int64_t first_y = band % call.bands_per_image() * call.rows_per_band;
    const int64_t last_y = std::min(shape.height, first_y + call.rows_per_band);
    const PaddedRows<A> rows(shape, first_y - shape.radius(), last_y + shape.radius());
    rows.copy_from(static_cast<const T*>(call.features) + image * plane * shape.channels);
    T* output = static_cast<T*>(call.output) + image * 2 * plane;
    for (int64_t y = first_y; y < last_y; ++y) {
      for (int64_t x = 0; x < shape.width; x += kBlock) {
        const int64_t count = std::min(kBlock, shape.width - x);
        hidden_block(rows, parameters, y, x, count, hidden.data, scales);
        for (int64_t p = 0; p < count; ++p) {
          T* target = output + y * shape.width + x + p;
          project_pixel(shape, parameters, hidden.data + p * shape.pixel_stride(), target, target + plane);
        }
      }
    }
  }
}

}  // namespace
}  // namespace stable_sam
