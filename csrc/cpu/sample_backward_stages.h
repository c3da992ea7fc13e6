// The four stages of the sampler's backward with their scratch, handed to the threads one after another.
#pragma once

#include "../dtypes.h"
#include "kernels.h"
#include "operator_inputs.h"

namespace stable_sam {

// `call` has its inputs and gradients; its scratch arrays are made here, beside `features`.
inline void run_sample_backward(const Tensor& features, BackwardCall call, ElementType element) {
  const SamplingShape& shape = call.inputs.shape;
  const Kernels& table = kernels();
  const int type = static_cast<int>(element);
  const int64_t rows = shape.batch * shape.height;
  const bool wants_products =
      call.grad_offsets || call.grad_alpha || (call.grad_amplitude && shape.amplitude_channels == 1);
  const auto scratch = [&](int64_t count, torch::headeronly::ScalarType scalar_type) {
    return torch::stable::new_empty(features, {count}, scalar_type);
  };
  const Tensor samples = scratch(rows * shape.width * table.sample_bytes[type], torch::headeronly::ScalarType::Byte);
  const Tensor products = scratch(wants_products ? rows * shape.width * 4 : 0, accumulator_type(element));
  const Tensor alpha_partials = scratch(call.grad_alpha ? rows * 2 : 0, accumulator_type(element));
  call.samples = samples.mutable_data_ptr();
  call.tap_products = wants_products ? products.mutable_data_ptr() : nullptr;
  call.alpha_partials = call.grad_alpha ? alpha_partials.mutable_data_ptr() : nullptr;

  const auto in_parallel = [&](BackwardKernel kernel, int64_t count, int64_t per_task) {
    torch::stable::parallel_for(0, count, per_task, [&](int64_t first, int64_t last) { kernel(call, first, last); });
  };
  const int64_t per_task = rows_per_task(shape);
  in_parallel(table.locate[type], rows, per_task);
  const bool one_task_walks_all = call.sums_features() || call.sums_identity();
  in_parallel(table.gather[type], one_task_walks_all ? shape.height : rows, one_task_walks_all ? 1 : per_task);
  in_parallel(table.finish[type], rows, per_task);
  if (call.grad_alpha) in_parallel(table.reduce[type], shape.batch, shape.batch);
}

}  // namespace stable_sam
