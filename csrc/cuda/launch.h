// Where a launch goes and what becomes of it.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

namespace stable_sam {

// Makes the device of `tensor` the current one for as long as it lives. It stands first in every operator: copies,
// allocations and launches belong to that device and its stream.
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

// Errors of kernels that ran before. They end the context, and every later call returns them.
inline bool comes_from_earlier_work(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

// `error` is what the launch itself returned, so an error that others left unread is neither blamed on it nor taken
// from them. A refused launch is told here and nowhere else: CUDA remembers it, too, and PyTorch's next launch would
// find it and fail.
inline void check_launch(const char* operation, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  STD_TORCH_CHECK(!comes_from_earlier_work(error), operation,
                  ": an earlier CUDA kernel failed (CUDA_LAUNCH_BLOCKING=1 shows which): ", cudaGetErrorString(error));
  STD_TORCH_CHECK(false, operation, ": the CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace stable_sam
