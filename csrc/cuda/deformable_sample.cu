// Entry point of deformable_sample on CUDA.
#include "device_inputs.h"
#include "forward_kernel.cuh"
#include "launch.h"
#include "operators.h"

namespace stable_sam {

Tensor deformable_sample_cuda(const Tensor& features, const Tensor& offsets, const std::optional<Tensor>& identity,
                              const std::optional<Tensor>& alpha, const std::optional<Tensor>& amplitude,
                              double max_offset) {
  const DeviceOf device(features);
  const DeviceInputs inputs(features, offsets, identity, alpha, amplitude, max_offset);
  const SamplingShape& shape = inputs.shape;
  const Tensor output = empty_channels_last(features, {shape.batch, shape.channels, shape.height, shape.width});
  if (output.numel() == 0) return output;

  const bool vectors = allow_vectors({&inputs.features, &output, pointer(inputs.identity),
                                      shape.amplitude_channels > 1 ? pointer(inputs.amplitude) : nullptr},
                                     shape.channels);
  with_kernel_types(features.scalar_type(), vectors, [&]<typename T, int Width>() {
    ForwardArguments<T> arguments{};
    arguments.features = elements<T>(inputs.features);
    arguments.offsets = elements<T>(inputs.offsets);
    arguments.identity = elements<T>(inputs.identity);
    arguments.alpha = elements<T>(inputs.alpha);
    arguments.amplitude = elements<T>(inputs.amplitude);
    arguments.output = mutable_elements<T>(output);
    arguments.shape = shape;
    check_launch("deformable_sample", launch_forward<T, Width>(arguments, device.stream()));
  });
  return output;
}

}  // namespace stable_sam
