// What crosses from the operators of deformable_sample to its kernels.
#pragma once

#include <cstdint>

#include "../sampling_shape.h"

namespace stable_sam {

// The inputs of a call, all of one element type; null where an optional one is absent. Axes as in SamplingShape.
struct SampleInputs {
  const void* features;   // [B or 1, H, W, C]
  const void* offsets;    // (B or 1, 2, H, W), strided
  const void* identity;   // [B or 1, H, W, C]
  const void* alpha;      // [B or 1, 2]
  const void* amplitude;  // [B or 1, H, W, 1 or C]
  SamplingShape shape;
};

struct ForwardCall {
  SampleInputs inputs;
  void* output;  // [B, H, W, C]
  bool bypass_cache;
};

// Gradients that nobody asked for are null. The scratch arrays hold accumulation-type numbers (double for
// double, float else).
struct BackwardCall {
  SampleInputs inputs;
  const void* grad_output;  // [B, H, W, C]
  void* grad_features;      // like features
  void* grad_offsets;       // [B, 2, H, W]
  void* grad_identity;      // like identity
  void* grad_alpha;         // [B, 2]
  void* grad_amplitude;     // [B, H, W, 1 or C]

  void* samples;         // [B, H, W] PixelSample
  void* tap_products;    // [B, H, W, 4] gradient . tap over channels; null where no gradient needs them
  void* alpha_partials;  // [B, H, 2] sums over one row
  bool bypass_cache;

  // Where one image's gradient is the sum over prompts, one task walks all prompts in order.
  bool sums_features() const { return grad_features && sums_over_prompts(inputs.shape.features_batch_stride); }
  bool sums_identity() const { return grad_identity && sums_over_prompts(inputs.shape.identity_batch_stride); }

 private:
  bool sums_over_prompts(int64_t batch_stride) const { return batch_stride == 0 && inputs.shape.batch != 1; }
};

}  // namespace stable_sam
