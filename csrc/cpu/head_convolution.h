// Depthwise convolution of a few rows, eight pixels and one vector of channels at a time.
#pragma once

#include <algorithm>

#include "head_parameters.h"
#include "sample_pixel.h"

namespace stable_sam {
namespace {

// Pixels computed together: a tap's weights are loaded once for all of them, and their sums fit the registers of every
// instruction set.
constexpr int64_t kBlock = 8;

// Rows of an image in the accumulation type with zeros around: beyond the image, beyond C, and behind the last column
// up to whole blocks, so that the loops below know no border.
template <typename A>
struct PaddedRows {
  const HeadShape& shape;
  const int64_t first_y, last_y;
  const int64_t row_stride;
  const AlignedArray<A> array;

  PaddedRows(const HeadShape& of, int64_t first, int64_t last)
      : shape(of),
        first_y(first),
        last_y(last),
        row_stride(((of.width + kBlock - 1) / kBlock * kBlock + 2 * of.radius()) * of.pixel_stride()),
        array((last - first) * row_stride) {
    std::fill_n(array.data, (last - first) * row_stride, A(0));
  }

  // Pixel (y, x) of the image; x may lie `radius` columns outside.
  A* pixel(int64_t y, int64_t x) const {
    return array.data + (y - first_y) * row_stride + (x + shape.radius()) * shape.pixel_stride();
  }

  // Fills the rows that lie within the image.
  template <typename T>
  void copy_from(const T* image) const {
    for (int64_t y = std::max<int64_t>(0, first_y); y < std::min(last_y, shape.height); ++y) {
      for (int64_t x = 0; x < shape.width; ++x) {
        const T* source = image + (y * shape.width + x) * shape.channels;
        A* target = pixel(y, x);
        for_each_vector<T>(shape.channels, [&](int64_t channel, auto load_some, auto) {
          store<A>(target + channel, load_some(source + channel));
        });
      }
    }
  }
};

// The convolution of kBlock pixels from (y, x) on, [kBlock, pixel_stride]; `weight_of(tap)` are its weights, taps row
// by row, and `bias` what it starts from (null: 0).
template <typename A, typename WeightOf>
void convolve_block(const PaddedRows<A>& rows, int64_t y, int64_t x, const WeightOf& weight_of, const A* bias,
                    A* output) {
  const HeadShape& shape = rows.shape;
  const int64_t radius = shape.radius(), stride = shape.pixel_stride();
  for (int64_t channel = 0; channel < shape.padded_channels(); channel += kLanes<A>) {
    Vector<A> sums[kBlock];
    for (auto& sum : sums) sum = bias == nullptr ? Vector<A>{} : load(bias + channel);
    for (int64_t tap_y = 0; tap_y < shape.kernel_size; ++tap_y) {
      const A* source = rows.pixel(y + tap_y - radius, x - radius) + channel;
      for (int64_t tap_x = 0; tap_x < shape.kernel_size; ++tap_x) {
        const Vector<A> weight = load(weight_of(tap_y * shape.kernel_size + tap_x) + channel);
        for (int64_t p = 0; p < kBlock; ++p) sums[p] += weight * load(source + (tap_x + p) * stride);
      }
    }
    for (int64_t p = 0; p < kBlock; ++p) store(output + p * stride + channel, sums[p]);
  }
}

// Adds the gradients of the weights: what the incoming gradient of kBlock pixels gives at each tap.
template <typename A>
void add_weight_gradients(const PaddedRows<A>& rows, int64_t y, int64_t x, const A* gradient,
                          const HeadParameters<A>& sums) {
  const HeadShape& shape = rows.shape;
  const int64_t radius = shape.radius(), stride = shape.pixel_stride();
  for (int64_t channel = 0; channel < shape.padded_channels(); channel += kLanes<A>) {
    Vector<A> incoming[kBlock];
    Vector<A> bias = load(sums.depthwise_bias() + channel);
    for (int64_t p = 0; p < kBlock; ++p) {
      incoming[p] = load(gradient + p * stride + channel);
      bias += incoming[p];
    }
    store(sums.depthwise_bias() + channel, bias);
    for (int64_t tap_y = 0; tap_y < shape.kernel_size; ++tap_y) {
      const A* source = rows.pixel(y + tap_y - radius, x - radius) + channel;
      for (int64_t tap_x = 0; tap_x < shape.kernel_size; ++tap_x) {
        A* target = sums.depthwise(tap_y * shape.kernel_size + tap_x) + channel;
        Vector<A> sum = load(target);
        for (int64_t p = 0; p < kBlock; ++p) sum += incoming[p] * load(source + (tap_x + p) * stride);
        store(target, sum);
      }
    }
  }
}

}  // namespace
}  // namespace stable_sam
