// What crosses from the operators of offset_head to its kernels.
#pragma once

#include <algorithm>
#include <cstdint>

namespace stable_sam {

// Axes: B prompts, H rows, W columns, C channels, K the depthwise kernel's size (odd).
struct HeadShape {
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t channels;
  int64_t kernel_size;
  double eps;

  int64_t radius() const { return kernel_size / 2; }
  int64_t taps() const { return kernel_size * kernel_size; }
  // Channels of scratch arrays: a multiple of every instruction set's vector, those beyond C hold 0.
  int64_t padded_channels() const { return (channels + 15) / 16 * 16; }
  // From one pixel of a scratch array to the next: one vector more, because pixels whole powers of two apart would
  // share a few sets of the first-level cache.
  int64_t pixel_stride() const { return padded_channels() + 16; }
  int64_t parameter_count() const { return (taps() + 6) * pixel_stride() + 2; }
};

// The parameters of a call, or gradients for them, one pointer each; null where a gradient is not asked for.
template <typename Pointer>
struct HeadParameterPointers {
  Pointer depthwise_weight;  // [C, K, K]
  Pointer depthwise_bias;    // [C]
  Pointer norm_weight;       // [C]
  Pointer norm_bias;         // [C]
  Pointer pointwise_weight;  // [2, C]
  Pointer pointwise_bias;    // [2]
};

struct HeadCall {
  HeadShape shape;
  const void* features;  // [B, H, W, C]
  HeadParameterPointers<const void*> given;
  void* parameters;  // HeadParameters of accumulation-type numbers, made by `prepare`
  void* output;      // [B, 2, H, W]

  int64_t rows_per_band;
  int64_t bands_per_image() const { return (shape.height + rows_per_band - 1) / rows_per_band; }
};

struct HeadBackwardCall {
  HeadCall forward;         // without output
  const void* grad_output;  // [B, 2, H, W]
  void* grad_features;      // [B, H, W, C]; null where not asked for
  HeadParameterPointers<void*> gradients;
  int64_t task_count;
  void* partials;  // [task_count] HeadParameters: sums of one task; null where no parameter's gradient is asked for

  // Tasks are a property of the shape, not of the threads, so that sums have one order.
  int64_t first_band(int64_t task) const { return task * forward.shape.batch * forward.bands_per_image() / task_count; }
};

using HeadKernel = void (*)(const HeadCall&, int64_t first, int64_t last);
using HeadBackwardKernel = void (*)(const HeadBackwardCall&, int64_t first, int64_t last);

// By ElementType. `forward` handles bands [first, last), `backward` tasks [first, last).
struct HeadKernels {
  void (*prepare[4])(const HeadCall&);
  HeadKernel forward[4];
  HeadBackwardKernel backward[4];
  void (*reduce[4])(const HeadBackwardCall&);
};

}  // namespace stable_sam
