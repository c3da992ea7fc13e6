// The CUDA operators' entry points with the kernels' host build below them, for tensors of the CPU. What PyTorch and
// CUDA are told is counted here; torch's own functions of these names are renamed on the compiler's command line:
//   -Dtorch_call_dispatcher=shim_call_dispatcher, and so on: see tests/host_kernels.py.
#include "deformable_sample.cu"
#include "deformable_sample_backward.cu"

#include <torch/csrc/stable/library.h>

extern "C" AOTITorchError real_call_dispatcher(const char*, const char*, StableIValue*,
                                               uint64_t) __asm__("torch_call_dispatcher");

namespace {

int guards = 0;
long guarded_calls = 0;
long unguarded_calls = 0;

}  // namespace

extern "C" {

AOTITorchError shim_call_dispatcher(const char* operation, const char* overload, StableIValue* stack,
                                    uint64_t version) {
  ++(guards > 0 ? guarded_calls : unguarded_calls);
  return real_call_dispatcher(operation, overload, stack, version);
}

AOTITorchError shim_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++guards;
  *guard = reinterpret_cast<DeviceGuardHandle>(&guards);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError shim_delete_device_guard(DeviceGuardHandle) {
  --guards;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError shim_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

void shim_reset() {
  guarded_calls = unguarded_calls = shim::evict_first_loads = 0;
  shim::last_error = shim::refusal = cudaSuccess;
}
int shim_guards() { return guards; }
long shim_guarded_calls() { return guarded_calls; }
long shim_unguarded_calls() { return unguarded_calls; }
long shim_evict_first_loads() { return shim::evict_first_loads; }
int shim_last_error() { return shim::last_error; }
void shim_leave_error(int error) { shim::last_error = static_cast<cudaError_t>(error); }
void shim_refuse_launches(int error) { shim::refusal = static_cast<cudaError_t>(error); }

}  // extern "C"

STABLE_TORCH_LIBRARY_IMPL(stable_sam_on_host, CPU, library) {
  library.impl("deformable_sample", TORCH_BOX(&stable_sam::deformable_sample_cuda));
  library.impl("deformable_sample_backward", TORCH_BOX(&stable_sam::deformable_sample_backward_cuda));
}
