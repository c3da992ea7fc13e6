// What the kernels of sampled_attention share: u of a few pixels, query rows laid out for the products, and sums over
// the splits of a prompt.
#pragma once

#include <algorithm>

#include "attention_calls.h"
#include "matrix_product.h"
#include "sample_pixel.h"

namespace stable_sam {
namespace {

// u, and u + key_pe, of up to kTilePixels pixels of one prompt, in the accumulation type; 0 beyond C.
template <typename T>
struct CalibratedTile {
  using A = Accumulator<T>;
  const AttentionInputs& inputs;
  const int64_t stride;
  const AlignedArray<A> values, keys;  // [kTilePixels, channel_stride]
  PixelSample<T> samples[kTilePixels];

  explicit CalibratedTile(const AttentionInputs& from)
      : inputs(from), stride(from.channel_stride()), values(kTilePixels * stride), keys(kTilePixels * stride) {
    std::fill_n(values.data, kTilePixels * stride, A(0));
    std::fill_n(keys.data, kTilePixels * stride, A(0));
  }

  // The pixels [first, first + count) of a prompt.
  void fill(int64_t prompt, int64_t first, int64_t count) {
    const SamplingShape& shape = inputs.sampling.shape;
    for (int64_t done = 0; done < count;) {
      const int64_t y = (first + done) / shape.width, x = (first + done) % shape.width;
      const int64_t columns = std::min(shape.width - x, count - done);
      locate_columns(inputs.sampling, prompt, y, x, columns, samples + done);
      done += columns;
    }
    const Alpha<T> alpha(inputs.sampling, prompt);
    for (int64_t i = 0; i < count; ++i) calibrate(prompt, first + i, alpha, samples[i], i);
  }

  LeftMatrix<A, false> keys_by_pixel() const { return {keys.data, stride}; }
  LeftMatrix<A, false> values_by_pixel() const { return {values.data, stride}; }
  LeftMatrix<A, true> keys_by_channel() const { return {keys.data, stride}; }
  LeftMatrix<A, true> values_by_channel() const { return {values.data, stride}; }

 private:
  void calibrate(int64_t prompt, int64_t pixel_index, const Alpha<T>& alpha, const PixelSample<T>& sample, int64_t i) {
    const SampleInputs& sampling = inputs.sampling;
    const SamplingShape& shape = sampling.shape;
    const auto feature = [&](int64_t tap_y, int64_t tap_x) {
      return pixel<T>(sampling.features, shape, shape.features_batch_stride, shape.channels, prompt, tap_y, tap_x);
    };
    const T* const taps[4] = {feature(sample.y.cell, sample.x.cell), feature(sample.y.cell, sample.x.next),
                              feature(sample.y.next, sample.x.cell), feature(sample.y.next, sample.x.next)};
    const auto weights = bilinear_weights(sample.y, sample.x);
    const A top_left = weights.top_left * alpha.sampled, top_right = weights.top_right * alpha.sampled;
    const A bottom_left = weights.bottom_left * alpha.sampled, bottom_right = weights.bottom_right * alpha.sampled;
    const int64_t own = pixel_index * shape.channels;
    const T* identity = static_cast<const T*>(sampling.identity) + prompt * shape.identity_batch_stride + own;
    const T* key_pe = static_cast<const T*>(inputs.key_pe) + prompt * inputs.key_pe_batch_stride + own;
    for_each_vector<T>(shape.channels, [&](int64_t channel, auto load_some, auto) {
      Vector<T> value = load_some(taps[0] + channel) * top_left;
      value += load_some(taps[1] + channel) * top_right;
      value += load_some(taps[2] + channel) * bottom_left;
      value += load_some(taps[3] + channel) * bottom_right;
      value += load_some(identity + channel) * alpha.identity;
      store<A>(values.data + i * stride + channel, value);
      store<A>(keys.data + i * stride + channel, value + load_some(key_pe + channel));
    });
  }
};

// One block of query rows, or of what has their shape, within an array named "transposed".
template <typename A>
inline Matrix<A> transposed_block(const AttentionInputs& inputs, A* transposed, int64_t first_row) {
  return {transposed + first_row * inputs.padded_channels(), inputs.block_width(first_row)};
}

// One prompt's rows [R, C] -> transposed, 0 where padded.
template <typename T>
void transpose_rows(const AttentionInputs& inputs, const T* rows, Accumulator<T>* transposed) {
  std::fill_n(transposed, inputs.transposed_count(), Accumulator<T>(0));
  for (int64_t row = 0; row < inputs.rows; ++row) {
    const int64_t first_row = row / kRowBlock * kRowBlock;
    const Matrix<Accumulator<T>> block = transposed_block(inputs, transposed, first_row);
    const T* source = rows + row * inputs.channels();
    for (int64_t channel = 0; channel < inputs.channels(); ++channel) {
      *block.at(channel, row - first_row) = widen(source[channel]);
    }
  }
}

// Transposed parts -> one prompt's rows [R, C]: sum over the splits of each part times `factors`, [splits, padded R].
template <typename T>
void merge_parts(const AttentionInputs& inputs, const Accumulator<T>* parts, int64_t part_count,
                 const Accumulator<T>* factors, T* rows) {
  using A = Accumulator<T>;
  const int64_t stride = inputs.channel_stride();
  const AlignedArray<A> sums(kRowBlock * stride);
  for (int64_t first_row = 0; first_row < inputs.rows; first_row += kRowBlock) {
    const int64_t width = inputs.block_width(first_row);
    const int64_t count = std::min(kRowBlock, inputs.rows - first_row);
    for (int64_t channel = 0; channel < inputs.channels(); ++channel) {
      for (int64_t lane = 0; lane < width; lane += kLanes<A>) {
        Vector<A> sum{};
        for (int64_t split = 0; split < inputs.splits; ++split) {
          const Matrix<const A> part = transposed_block(inputs, parts + split * part_count, first_row);
          sum += load(part.at(channel, lane)) * load(factors + split * inputs.padded_rows() + first_row + lane);
        }
        for (int64_t i = 0; i < kLanes<A>; ++i) sums.data[(lane + i) * stride + channel] = sum[i];
      }
    }
    for (int64_t row = 0; row < count; ++row) {
      const A* source = sums.data + row * stride;
      T* target = rows + (first_row + row) * inputs.channels();
      for_each_vector<T>(inputs.channels(), [&](int64_t channel, auto, auto store_some) {
        store_some(target + channel, load(source + channel));
      });
    }
  }
}

}  // namespace
}  // namespace stable_sam
