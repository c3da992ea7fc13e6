// offset_head on the CPU: checks, memory, and bands of rows handed to the threads.
#include <torch/csrc/stable/library.h>

#include "head_inputs.h"

namespace stable_sam {
namespace {

// A band reads `radius` rows on either side again, which matters little beside a convolution of as many taps.
constexpr int64_t kRowsPerBand = 8;

Tensor offset_head(const Tensor& features, const Tensor& depthwise_weight, const Tensor& depthwise_bias,
                   const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& pointwise_weight,
                   const Tensor& pointwise_bias, double eps) {
  HeadOperatorInputs inputs(
      features, {depthwise_weight, depthwise_bias, norm_weight, norm_bias, pointwise_weight, pointwise_bias}, eps,
      kRowsPerBand);
  HeadCall& call = inputs.call;
  Tensor output = torch::stable::new_empty(features, {call.shape.batch, 2, call.shape.height, call.shape.width});
  if (output.numel() == 0) return output;
  call.output = output.mutable_data_ptr();
  const HeadKernel kernel = kernels().head.forward[static_cast<int>(inputs.type)];
  torch::stable::parallel_for(0, call.shape.batch * call.bands_per_image(), 1,
                              [&](int64_t first, int64_t last) { kernel(call, first, last); });
  return output;
}

}  // namespace
}  // namespace stable_sam

STABLE_TORCH_LIBRARY_IMPL(stable_sam_cuda, CPU, library) {
  library.impl("offset_head", TORCH_BOX(&stable_sam::offset_head));
}
