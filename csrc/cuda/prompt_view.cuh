// What the backward reads of one prompt.
#pragma once

#include <cuda_runtime.h>

#include "backward_arguments.h"
#include "vector.cuh"

namespace stable_sam {

// One prompt's maps and scales. The identity, the alpha and the amplitude may be missing.
template <typename T>
struct PromptView {
  int64_t output_map;  // where the prompt's map begins in the output, and in all that is shaped like it
  const T* features;
  const T* identity;
  const T* amplitude;
  float sampled_scale;
  float identity_scale;

  __device__ __forceinline__ PromptView(const BackwardArguments<T>& arguments, int prompt)
      : output_map(prompt * (arguments.shape.height * arguments.shape.width * arguments.shape.channels)),
        features(arguments.features + prompt * arguments.shape.features_batch_stride),
        identity(arguments.identity + prompt * arguments.shape.identity_batch_stride),
        amplitude(arguments.amplitude != nullptr ? arguments.amplitude + prompt * arguments.shape.amplitude_batch_stride
                                                 : nullptr),
        sampled_scale(1.0f),
        identity_scale(0.0f) {
    if (arguments.alpha != nullptr) {
      sampled_scale = to_float(arguments.alpha[prompt * arguments.shape.alpha_batch_stride]);
      identity_scale = to_float(arguments.alpha[prompt * arguments.shape.alpha_batch_stride + 1]);
    }
  }
};

}  // namespace stable_sam
