// The tensors of a call made ready for the kernels, shared by the forward and the backward operator.
#pragma once

#include <algorithm>
#include <optional>

#include "../checks.h"
#include "../dtypes.h"
#include "kernels.h"
#include "layout.h"

namespace stable_sam {

// Holds the channels-last tensors (copies only where an input is not channels-last already) for as long as
// the kernels need `raw`.
struct OperatorInputs {
  Tensor features, offsets;
  std::optional<Tensor> identity, alpha, amplitude;
  ElementType type;
  SampleInputs raw;

  OperatorInputs(const Tensor& given_features, const Tensor& given_offsets, const std::optional<Tensor>& given_identity,
                 const std::optional<Tensor>& given_alpha, const std::optional<Tensor>& given_amplitude,
                 double max_offset)
      : features(given_features),
        offsets(given_offsets),
        identity(given_identity),
        alpha(given_alpha),
        amplitude(given_amplitude),
        type(element_type(given_features.scalar_type())) {
    const SamplingShape shape = checked_shape(features, offsets, identity, alpha, amplitude, max_offset);
    features = channels_last_on_cpu(features);
    identity = channels_last_on_cpu(identity);
    amplitude = channels_last_on_cpu(amplitude);
    if (alpha) alpha = torch::stable::contiguous(*alpha);
    raw = {features.const_data_ptr(), offsets.const_data_ptr(),
           pointer(identity),         pointer(alpha),
           pointer(amplitude),        shape};
  }

 private:
  static const void* pointer(const std::optional<Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr() : nullptr;
  }
};

// Few enough rows that all threads share the work, enough that starting a thread is worth it.
inline int64_t rows_per_task(const SamplingShape& shape) {
  constexpr int64_t kElementsPerTask = 16384;
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, shape.width * shape.channels));
}

}  // namespace stable_sam
