// Backward of sampled_attention: a tile's u and its probabilities are computed again from the logsumexp. With the
// gradient g of the pooled features and delta = g . pooled, for every row and pixel
//
//   p = exp(logit - logsumexp)          grad_u     = sum over rows of p g + ds query
//   ds = p (g . u - delta)              grad_query = sum over pixels of ds (u + key_pe);  grad_key_pe = sum of ds query
//
// grad_u is written for a group of prompts and then goes through the sampler's own backward.
#pragma once

#include <algorithm>

#include "attention_tile.h"
#include "exponential.h"

namespace stable_sam {
namespace {

// One prompt's rows and what its backward needs of them.
template <typename T>
struct BackwardRows {
  using A = Accumulator<T>;
  const AttentionInputs& inputs;
  const int64_t stride;
  const AlignedArray<A> queries, gradients;                        // [R, channel_stride]
  const AlignedArray<A> transposed_queries, transposed_gradients;  // transposed
  const AlignedArray<A> logsumexp, delta;                          // [padded R]

  explicit BackwardRows(const AttentionInputs& from)
      : inputs(from),
        stride(from.channel_stride()),
        queries(from.rows * stride),
        gradients(from.rows * stride),
        transposed_queries(from.transposed_count()),
        transposed_gradients(from.transposed_count()),
        logsumexp(from.padded_rows()),
        delta(from.padded_rows()) {}

  void load_prompt(const AttentionBackwardCall& call, int64_t prompt) const {
    const int64_t count = inputs.rows * inputs.channels();
    const T* query_rows = static_cast<const T*>(inputs.query_rows) + prompt * count;
    const T* grad_pooled = static_cast<const T*>(call.grad_pooled) + prompt * count;
    const T* pooled = static_cast<const T*>(call.pooled) + prompt * count;
    transpose_rows(inputs, query_rows, transposed_queries.data);
    transpose_rows(inputs, grad_pooled, transposed_gradients.data);
    widen_rows(query_rows, queries.data);
    widen_rows(grad_pooled, gradients.data);
    std::fill_n(logsumexp.data, inputs.padded_rows(), A(0));
    std::fill_n(delta.data, inputs.padded_rows(), A(0));
    for (int64_t row = 0; row < inputs.rows; ++row) {
      logsumexp.data[row] = static_cast<const A*>(call.logsumexp)[prompt * inputs.rows + row];
      Vector<T> product{};
      for_each_vector<T>(inputs.channels(), [&](int64_t channel, auto load_some, auto) {
        const int64_t at = row * inputs.channels() + channel;
        product += load_some(grad_pooled + at) * load_some(pooled + at);
      });
      delta.data[row] = sum_of_lanes(product);
    }
  }

 private:
  void widen_rows(const T* source, A* target) const {
    std::fill_n(target, inputs.rows * stride, A(0));
    for (int64_t row = 0; row < inputs.rows; ++row) {
      for_each_vector<T>(inputs.channels(), [&](int64_t channel, auto load_some, auto) {
        store<A>(target + row * stride + channel, load_some(source + row * inputs.channels() + channel));
      });
    }
  }
};

// Gradients of one tile while blocks of rows add to them.
template <typename T>
struct BackwardTile {
  using A = Accumulator<T>;
  const AttentionBackwardCall& call;
  const AttentionInputs& inputs;
  CalibratedTile<T> tile;
  const AlignedArray<A> shares, slopes;                // [kTilePixels, width]: p, and g . u that becomes ds
  const AlignedArray<A> value_gradient, key_gradient;  // [kTilePixels, channel_stride]: sums of p g, and of ds query

  explicit BackwardTile(const AttentionBackwardCall& from)
      : call(from),
        inputs(from.inputs),
        tile(from.inputs),
        shares(kTilePixels * kRowBlock),
        slopes(kTilePixels * kRowBlock),
        value_gradient(kTilePixels * tile.stride),
        key_gradient(kTilePixels * tile.stride) {}

  // Pixels [pixel, pixel + count) of a prompt; `row_sums`, transposed, receive the gradients of the query rows.
  void run(const BackwardRows<T>& rows, int64_t prompt, int64_t pixel, int64_t count, A* row_sums) {
    const int64_t channels = inputs.padded_channels(), stride = tile.stride;
    tile.fill(prompt, pixel, count);
    for (int64_t row = 0; row < inputs.rows; row += kRowBlock) {
      const int64_t width = inputs.block_width(row), own_rows = std::min(kRowBlock, inputs.rows - row);
      const Matrix<A> p{shares.data, width}, ds{slopes.data, width};
      multiply(tile.keys_by_pixel(), transposed_block<const A>(inputs, rows.transposed_queries.data, row), count, width,
               channels, false, p);
      multiply(tile.values_by_pixel(), transposed_block<const A>(inputs, rows.transposed_gradients.data, row), count,
               width, channels, false, ds);
      differentiate_softmax(p, ds, count, width, rows.logsumexp.data + row, rows.delta.data + row);
      const LeftMatrix<A, false> p_by_pixel{p.data, width}, ds_by_pixel{ds.data, width};
      if (call.grad_calibrated) {
        multiply(p_by_pixel, Matrix<const A>{rows.gradients.data + row * stride, stride}, count, channels, own_rows,
                 row > 0, Matrix<A>{value_gradient.data, stride});
      }
      if (wants_key_gradient()) {
        multiply(ds_by_pixel, Matrix<const A>{rows.queries.data + row * stride, stride}, count, channels, own_rows,
                 row > 0, Matrix<A>{key_gradient.data, stride});
      }
      if (call.grad_query_rows) {
        multiply(tile.keys_by_channel(), Matrix<const A>{ds.data, width}, channels, width, count, true,
                 transposed_block(inputs, row_sums, row));
      }
    }
    for (int64_t i = 0; i < count; ++i) store_pixel(prompt, pixel + i, i);
  }

 private:
  bool wants_key_gradient() const { return call.grad_calibrated || call.grad_key_pe || call.key_pe_sums; }

  // Logits and products with u become p and ds.
  void differentiate_softmax(Matrix<A> p, Matrix<A> ds, int64_t count, int64_t width, const A* logsumexp,
                             const A* delta) const {
    for (int64_t lane = 0; lane < width; lane += kLanes<A>) {
      const Vector<A> level = load(logsumexp + lane), mean = load(delta + lane);
      for (int64_t i = 0; i < count; ++i) {
        const Vector<A> share = exp_of_lanes(load(p.at(i, lane)) - level);
        store(p.at(i, lane), share);
        store(ds.at(i, lane), share * (load(ds.at(i, lane)) - mean));
      }
    }
  }

  void store_pixel(int64_t prompt, int64_t pixel, int64_t i) const {
    const A* of_value = value_gradient.data + i * tile.stride;
    const A* of_key = key_gradient.data + i * tile.stride;
    const int64_t channels = inputs.channels();
    const int64_t at = (prompt * inputs.pixels() + pixel) * channels;
    if (call.grad_calibrated) {
      T* target = static_cast<T*>(call.grad_calibrated) + at;
      for_each_vector<T>(channels, [&](int64_t channel, auto, auto store_some) {
        store_some(target + channel, load(of_value + channel) + load(of_key + channel));
      });
    }
    if (call.grad_key_pe) {
      T* target = static_cast<T*>(call.grad_key_pe) + at;
      for_each_vector<T>(channels, [&](int64_t channel, auto, auto store_some) {
        store_some(target + channel, load(of_key + channel));
      });
    }
    if (call.key_pe_sums) {
      A* target = static_cast<A*>(call.key_pe_sums) + pixel * channels;
      for_each_vector<A>(channels, [&](int64_t channel, auto load_some, auto store_some) {
        store_some(target + channel, load_some(target + channel) + load(of_key + channel));
      });
    }
  }
};

// Tasks [first, last): one split of one prompt, or of all prompts in order where they share the gradient of key_pe.
template <typename T>
void attention_backward(const AttentionBackwardCall& call, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const AttentionInputs& inputs = call.inputs;
  const BackwardRows<T> rows(inputs);
  BackwardTile<T> tile(call);
  for (int64_t task = first; task < last; ++task) {
    const int64_t split = call.key_pe_sums ? task : task % inputs.splits;
    const int64_t first_prompt = call.key_pe_sums ? 0 : task / inputs.splits;
    const int64_t last_prompt = call.key_pe_sums ? inputs.batch() : first_prompt + 1;
    const int64_t last_pixel = std::min(inputs.pixels(), (split + 1) * inputs.pixels_per_split);
    for (int64_t prompt = first_prompt; prompt < last_prompt; ++prompt) {
      rows.load_prompt(call, prompt);
      A* row_sums = nullptr;
      if (call.grad_query_rows) {
        row_sums = static_cast<A*>(call.parts) + (prompt * inputs.splits + split) * inputs.transposed_count();
        std::fill_n(row_sums, inputs.transposed_count(), A(0));
      }
      for (int64_t pixel = split * inputs.pixels_per_split; pixel < last_pixel; pixel += kTilePixels) {
        tile.run(rows, prompt, pixel, std::min(kTilePixels, last_pixel - pixel), row_sums);
      }
    }
  }
}

// Prompts [first, last): the splits' gradients of the query rows joined in order.
template <typename T>
void merge_row_gradients(const AttentionBackwardCall& call, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const AttentionInputs& inputs = call.inputs;
  const AlignedArray<A> ones(inputs.splits * inputs.padded_rows());
  std::fill_n(ones.data, inputs.splits * inputs.padded_rows(), A(1));
  for (int64_t prompt = first; prompt < last; ++prompt) {
    const A* parts = static_cast<const A*>(call.parts) + prompt * inputs.splits * inputs.transposed_count();
    T* target = static_cast<T*>(call.grad_query_rows) + prompt * inputs.rows * inputs.channels();
    merge_parts<T>(inputs, parts, inputs.transposed_count(), ones.data, target);
  }
}

// Elements [first, last) of gradients that are summed over groups of prompts.
template <typename T>
void add_to_sums(const void* values, void* sums, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const T* from = static_cast<const T*>(values) + first;
  A* to = static_cast<A*>(sums) + first;
  for_each_vector<T>(last - first, [&](int64_t i, auto load_some, auto store_some) {
    store_some(to + i, load_some(to + i) + load_some(from + i));
  });
}

template <typename T>
void round_sums(const void* sums, void* values, int64_t first, int64_t last) {
  const Accumulator<T>* from = static_cast<const Accumulator<T>*>(sums) + first;
  T* to = static_cast<T*>(values) + first;
  for_each_vector<T>(last - first,
                     [&](int64_t i, auto load_some, auto store_some) { store_some(to + i, load_some(from + i)); });
}

}  // namespace
}  // namespace stable_sam
