// Forward of sampled_attention: a walk over the pixels of one prompt with a running softmax. Query rows are the lanes
// of the vectors, so that softmax needs no sum across lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention_tile.h"
#include "exponential.h"

namespace stable_sam {
namespace {

template <typename A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();

// Logits of -inf alone must not give the NaN of inf - inf.
template <typename V>
inline V finite_level(V highest) {
  using A = std::remove_cvref_t<decltype(highest[0])>;
  return highest == kLowest<A> ? V{} : highest;
}

// One tile's logits [count, width] become exponentials below the highest so far; sums, [C, width], and totals fade
// where the highest rises.
template <typename A>
void update_softmax(Matrix<A> logits, int64_t count, int64_t width, Matrix<A> sums, int64_t channels, A* highest,
                    A* total) {
  const Vector<A> ones = Vector<A>{} + A(1);
  for (int64_t lane = 0; lane < width; lane += kLanes<A>) {
    const Vector<A> before = load(highest + lane);
    Vector<A> above = before;
    for (int64_t p = 0; p < count; ++p) {
      const Vector<A> logit = load(logits.at(p, lane));
      above = logit > above ? logit : above;  // passes NaN by, which the exponential keeps
    }
    const Vector<A> level = finite_level(above);
    const Vector<A> fading = exp_of_lanes(before - level);
    Vector<A> sum = load(total + lane) * fading;
    for (int64_t p = 0; p < count; ++p) {
      const Vector<A> share = exp_of_lanes(load(logits.at(p, lane)) - level);
      sum += share;
      store(logits.at(p, lane), share);
    }
    store(highest + lane, above);
    store(total + lane, sum);
    if (std::memcmp(&fading, &ones, sizeof(ones)) == 0) continue;
    for (int64_t channel = 0; channel < channels; ++channel) {
      store(sums.at(channel, lane), load(sums.at(channel, lane)) * fading);
    }
  }
}

// Splits [first, last) of all B prompts.
template <typename T>
void attend(const AttentionCall& call, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const AttentionInputs& inputs = call.inputs;
  const int64_t padded_rows = inputs.padded_rows(), channels = inputs.padded_channels();
  CalibratedTile<T> tile(inputs);
  const AlignedArray<A> queries(inputs.transposed_count());
  const AlignedArray<A> logits(kTilePixels * kRowBlock);
  int64_t packed_prompt = -1;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t prompt = unit / inputs.splits, split = unit % inputs.splits;
    if (prompt != packed_prompt) {
      transpose_rows(inputs, static_cast<const T*>(call.inputs.query_rows) + prompt * inputs.rows * inputs.channels(),
                     queries.data);
      packed_prompt = prompt;
    }
    A* sums = static_cast<A*>(call.parts) + unit * call.part_count();
    A* highest = sums + inputs.transposed_count();
    A* total = highest + padded_rows;
    std::fill(sums, highest, A(0));
    std::fill(highest, total, kLowest<A>);
    std::fill_n(total, padded_rows, A(0));

    const int64_t last_pixel = std::min(inputs.pixels(), (split + 1) * inputs.pixels_per_split);
    for (int64_t pixel = split * inputs.pixels_per_split; pixel < last_pixel; pixel += kTilePixels) {
      const int64_t count = std::min(kTilePixels, last_pixel - pixel);
      tile.fill(prompt, pixel, count);
      for (int64_t row = 0; row < inputs.rows; row += kRowBlock) {
        const int64_t width = inputs.block_width(row);
        const Matrix<const A> block = transposed_block<const A>(inputs, queries.data, row);
        const Matrix<A> block_sums = transposed_block(inputs, sums, row);
        const Matrix<A> shares{logits.data, width};
        multiply(tile.keys_by_pixel(), block, count, width, channels, false, shares);
        update_softmax(shares, count, width, block_sums, channels, highest + row, total + row);
        multiply(tile.values_by_channel(), Matrix<const A>{shares.data, width}, channels, width, count, true,
                 block_sums);
      }
    }
  }
}

// Prompts [first, last): the splits' results joined in order.
template <typename T>
void merge_attention(const AttentionCall& call, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const AttentionInputs& inputs = call.inputs;
  const int64_t padded_rows = inputs.padded_rows();
  const AlignedArray<A> factors(inputs.splits * padded_rows);
  for (int64_t prompt = first; prompt < last; ++prompt) {
    const A* parts = static_cast<const A*>(call.parts) + prompt * inputs.splits * call.part_count();
    const auto highest_of = [&](int64_t split) {
      return parts + split * call.part_count() + inputs.transposed_count();
    };
    A* logsumexp = static_cast<A*>(call.logsumexp) + prompt * inputs.rows;
    for (int64_t row = 0; row < padded_rows; row += kLanes<A>) {
      Vector<A> highest = load(highest_of(0) + row), total{};
      for (int64_t split = 1; split < inputs.splits; ++split) {
        const Vector<A> other = load(highest_of(split) + row);
        highest = other > highest ? other : highest;
      }
      const Vector<A> level = finite_level(highest);
      for (int64_t split = 0; split < inputs.splits; ++split) {
        const Vector<A> factor = exp_of_lanes(load(highest_of(split) + row) - level);
        total += factor * load(highest_of(split) + padded_rows + row);
        store(factors.data + split * padded_rows + row, factor);
      }
      for (int64_t split = 0; split < inputs.splits; ++split) {
        A* factor = factors.data + split * padded_rows + row;
        store(factor, load(factor) / total);
      }
      for (int64_t lane = 0; lane < kLanes<A> && row + lane < inputs.rows; ++lane) {
        logsumexp[row + lane] = highest[lane] + std::log(total[lane]);
      }
    }
    merge_parts<T>(inputs, parts, call.part_count(), factors.data,
                   static_cast<T*>(call.pooled) + prompt * inputs.rows * inputs.channels());
  }
}

}  // namespace
}  // namespace stable_sam
