// Where a launch goes and what becomes of it.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

namespace stable_sam {

// Makes the device of `tensor` the current one for as long as it lives. Allocations and launches of an
// operator stand under it.
class DeviceOf {
 public:
  explicit DeviceOf(const torch::stable::Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(tensor.get_device_index()) {}

  // PyTorch's current stream on that device.
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  torch::stable::accelerator::DeviceIndex index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(const char* operation, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, operation, ": the CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace stable_sam
