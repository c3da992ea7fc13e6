// The tensors of a call made ready for the kernels, shared by the forward and the backward operator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../checks.h"
#include "tile_plan.h"
#include "vector.cuh"

namespace stable_sam {

// Holds the channels-last tensors (copies only where an input is not channels-last already).
struct DeviceInputs {
  Tensor features;
  Tensor offsets;
  std::optional<Tensor> identity;
  std::optional<Tensor> alpha;
  std::optional<Tensor> amplitude;
  SamplingShape shape;

  DeviceInputs(const Tensor& given_features, const Tensor& given_offsets, const std::optional<Tensor>& given_identity,
               const std::optional<Tensor>& given_alpha, const std::optional<Tensor>& given_amplitude,
               double max_offset)
      : features(given_features),
        offsets(given_offsets),
        identity(given_identity),
        alpha(given_alpha),
        amplitude(given_amplitude),
        shape(checked_shape(features, offsets, identity, alpha, amplitude, max_offset)) {
    STD_TORCH_CHECK(fits_kernels(shape), "features: expected fewer than 2^30 elements a prompt, got height ",
                    shape.height, ", width ", shape.width, ", channels ", shape.channels, ", batch ", shape.batch);
    features = channels_last(features);
    identity = channels_last(identity);
    amplitude = channels_last(amplitude);
    if (alpha) alpha = torch::stable::contiguous(*alpha);
  }
};

template <typename T>
const T* elements(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* elements(const std::optional<Tensor>& tensor) {
  return tensor ? elements<T>(*tensor) : nullptr;
}

template <typename T>
T* mutable_elements(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor empty_channels_last(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// Whether 16-byte accesses along the channels serve all tensors; absent and empty ones do not matter.
inline bool allow_vectors(std::initializer_list<const Tensor*> tensors, int64_t channels) {
  for (const Tensor* tensor : tensors) {
    if (tensor == nullptr || tensor->numel() == 0) continue;
    if (!allows_vectors(tensor->const_data_ptr(), channels * static_cast<int64_t>(tensor->element_size())))
      return false;
  }
  return true;
}

inline const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

// Calls `function.template operator()<T, Width>()` with the element type and the channels of one access.
template <typename Function>
void with_kernel_types(torch::headeronly::ScalarType type, bool vectors, const Function& function) {
  using torch::headeronly::ScalarType;
  const auto with_width = [&]<typename T>() {
    if (vectors) {
      function.template operator()<T, kVectorWidth<T>>();
    } else {
      function.template operator()<T, 1>();
    }
  };
  if (type == ScalarType::Float) {
    with_width.template operator()<float>();
  } else if (type == ScalarType::Half) {
    with_width.template operator()<__half>();
  } else if (type == ScalarType::BFloat16) {
    with_width.template operator()<__nv_bfloat16>();
  } else {
    STD_TORCH_CHECK(false, "features: expected dtype float32, float16 or bfloat16 on CUDA, got ",
                    torch::headeronly::toString(type));
  }
}

}  // namespace stable_sam
