// The tensors of an offset_head call checked and made ready for the kernels.
#pragma once

#include <array>

#include "../checks.h"
#include "../dtypes.h"
#include "head_calls.h"
#include "kernels.h"
#include "layout.h"

namespace stable_sam {

constexpr const char* kHeadParameterNames[] = {"depthwise_weight", "depthwise_bias",   "norm_weight",
                                               "norm_bias",        "pointwise_weight", "pointwise_bias"};

// Holds the tensors that `call` points to.
struct HeadOperatorInputs {
  Tensor features;
  std::array<Tensor, 6> parameters;
  ElementType type;
  HeadCall call;
  Tensor prepared;

  HeadOperatorInputs(const Tensor& given_features, const std::array<Tensor, 6>& given_parameters, double eps,
                     int64_t rows_per_band)
      : features(given_features),
        parameters(given_parameters),
        type(element_type(given_features.scalar_type())),
        call{checked_shape(eps), nullptr, {}, nullptr, nullptr, rows_per_band},
        prepared(torch::stable::new_empty(features, {call.shape.parameter_count()}, accumulator_type(type))) {
    features = channels_last_on_cpu(features);
    std::array<const void*, 6> raw;
    for (int i = 0; i < 6; ++i) {
      parameters[i] = torch::stable::contiguous(parameters[i]);
      raw[i] = parameters[i].const_data_ptr();
    }
    call.features = features.const_data_ptr();
    call.given = {raw[0], raw[1], raw[2], raw[3], raw[4], raw[5]};
    call.parameters = prepared.mutable_data_ptr();
    kernels().head.prepare[static_cast<int>(type)](call);
  }

 private:
  HeadShape checked_shape(double eps) const {
    check_alike("features", features, features, 4);
    const int64_t channels = features.size(1);
    check_alike("depthwise_weight", parameters[0], features, 4);
    const int64_t size = parameters[0].size(3);
    STD_TORCH_CHECK(size % 2 == 1, "depthwise_weight: expected an odd kernel size, got ", size);
    check_parameter(0, {channels, 1, size, size});
    for (int i : {1, 2, 3}) check_parameter(i, {channels});
    check_parameter(4, {2, channels, 1, 1});
    check_parameter(5, {2});
    return {features.size(0), features.size(2), features.size(3), channels, size, eps};
  }

  void check_parameter(int index, std::initializer_list<int64_t> sizes) const {
    const char* name = kHeadParameterNames[index];
    const Tensor& parameter = parameters[index];
    check_alike(name, parameter, features, static_cast<int64_t>(sizes.size()));
    int64_t axis = 0;
    for (const int64_t size : sizes) {
      STD_TORCH_CHECK(parameter.size(axis) == size, name, ": expected size ", size, " along axis ", axis, ", got ",
                      parameter.size(axis));
      ++axis;
    }
  }
};

}  // namespace stable_sam
