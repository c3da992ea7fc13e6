// deformable_sample on the CPU: checks, memory, and rows handed to the threads.
#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../dtypes.h"
#include "kernels.h"
#include "memory.h"
#include "operator_inputs.h"

namespace stable_sam {
namespace {

Tensor deformable_sample(const Tensor& features, const Tensor& offsets, const std::optional<Tensor>& identity,
                         const std::optional<Tensor>& alpha, const std::optional<Tensor>& amplitude,
                         double max_offset) {
  const OperatorInputs inputs(features, offsets, identity, alpha, amplitude, max_offset);
  const SamplingShape& shape = inputs.raw.shape;
  Tensor output = empty_channels_last(features, {shape.batch, shape.channels, shape.height, shape.width});
  if (output.numel() == 0) return output;
  prefer_huge_pages(output);

  const ForwardCall call{inputs.raw, output.mutable_data_ptr(), bypasses_cache(output, shape.channels)};
  const ForwardKernel kernel = kernels().sample[static_cast<int>(inputs.type)];
  torch::stable::parallel_for(0, shape.batch * shape.height, rows_per_task(shape),
                              [&](int64_t first, int64_t last) { kernel(call, first, last); });
  return output;
}

}  // namespace
}  // namespace stable_sam

STABLE_TORCH_LIBRARY_IMPL(stable_sam_cuda, CPU, library) {
  library.impl("deformable_sample", TORCH_BOX(&stable_sam::deformable_sample));
}
