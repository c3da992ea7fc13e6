// What crosses from the operators of sampled_attention to its kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sample_calls.h"

namespace stable_sam {

// Pixels of u that are held at a time: a multiple of the product's block of rows. With 256 channels of float32 they
// take 54 KB twice (u, and u + key_pe), as much as the query rows and their sums beside them in the second-level cache.
inline constexpr int64_t kTilePixels = 48;
// Query rows that lie beside one another for every channel; more of them are further blocks.
inline constexpr int64_t kRowBlock = 64;

// Axes: B prompts, R query rows, C channels, H * W pixels. Arrays named "transposed" are [blocks, C, rows of the block]
// with C and R padded to whole vectors by zeros.
struct AttentionInputs {
  SampleInputs sampling;   // with identity and alpha; no amplitude
  const void* query_rows;  // [B, R, C]
  const void* key_pe;      // [B or 1, H, W, C]
  int64_t key_pe_batch_stride;
  int64_t rows;
  // Each prompt's pixels are shared among as many tasks. A property of the shape, not of the threads, so that sums have
  // one order.
  int64_t splits;
  int64_t pixels_per_split;

  int64_t batch() const { return sampling.shape.batch; }
  int64_t channels() const { return sampling.shape.channels; }
  int64_t pixels() const { return sampling.shape.height * sampling.shape.width; }
  int64_t padded_rows() const { return (rows + 15) / 16 * 16; }
  int64_t padded_channels() const { return (channels() + 15) / 16 * 16; }
  // From one pixel or row to the next where channels lie side by side: one vector more than needed, because addresses
  // whole powers of two apart would share a few sets of the first-level cache.
  int64_t channel_stride() const { return padded_channels() + 16; }
  int64_t block_width(int64_t first_row) const { return std::min(kRowBlock, padded_rows() - first_row); }
  int64_t transposed_count() const { return padded_channels() * padded_rows(); }

  void split_pixels(int64_t wanted_splits) {
    const int64_t tiles = std::max<int64_t>(1, (pixels() + kTilePixels - 1) / kTilePixels);
    const int64_t tiles_per_split = (tiles + wanted_splits - 1) / wanted_splits;
    pixels_per_split = tiles_per_split * kTilePixels;
    splits = (tiles + tiles_per_split - 1) / tiles_per_split;
  }
};

struct AttentionCall {
  AttentionInputs inputs;
  void* parts;      // [B, splits] of transposed sums, then the highest logit and the sum of each row, [2, padded R]
  void* pooled;     // [B, R, C]
  void* logsumexp;  // [B, R] of the accumulation type

  int64_t part_count() const { return inputs.transposed_count() + 2 * inputs.padded_rows(); }
};

// A group of prompts. Gradients that nobody asked for are null.
struct AttentionBackwardCall {
  AttentionInputs inputs;
  const void* grad_pooled;  // [B, R, C]
  const void* pooled;       // [B, R, C]
  const void* logsumexp;    // [B, R] of the accumulation type
  void* grad_calibrated;    // [B, H, W, C], of u
  void* grad_key_pe;        // [B, H, W, C]
  void* key_pe_sums;        // [H, W, C] of the accumulation type: in place of grad_key_pe where prompts share key_pe
  void* grad_query_rows;    // [B, R, C]
  void* parts;              // [B, splits] of transposed gradients of the query rows

  // Where the gradient of key_pe is summed over prompts, one task walks all prompts in order.
  int64_t task_count() const { return key_pe_sums ? inputs.splits : inputs.batch() * inputs.splits; }
};

using AttentionKernel = void (*)(const AttentionCall&, int64_t first, int64_t last);
using AttentionBackwardKernel = void (*)(const AttentionBackwardCall&, int64_t first, int64_t last);

// By ElementType. A kernel handles [first, last) of what it says it counts.
struct AttentionKernels {
  AttentionKernel attend[4];                                                      // B * splits
  AttentionKernel merge[4];                                                       // prompts
  AttentionBackwardKernel backward[4];                                            // tasks
  AttentionBackwardKernel merge_rows[4];                                          // prompts
  void (*add[4])(const void* values, void* sums, int64_t first, int64_t last);    // elements: sums += values
  void (*round[4])(const void* sums, void* values, int64_t first, int64_t last);  // elements: values = sums
};

}  // namespace stable_sam
