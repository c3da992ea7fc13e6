// Stands in for CUDA's own header, so that a plain C++ compiler makes host code of the kernels. A block's
// threads run as fibers, in step at every barrier and warp primitive: see block_runner.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>

#include "block_runner.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};

// Loads and stores go through these types, whatever the array holds; a misaligned one is an error.
struct [[gnu::may_alias]] alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace shim {

inline long evict_first_loads = 0;

}  // namespace shim

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
T __ldg(const T* source) {
  return *source;
}

template <typename T>
T __ldcs(const T* source) {
  ++shim::evict_first_loads;
  return *source;
}

template <typename T>
void __stcs(T* target, T value) {
  *target = value;
}

// Warp primitives. Every lane of the warp has to come to the same call; the shim stops if one does not.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, std::source_location where = std::source_location::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t result = shim::exchange(mask, bits, source & 31, where);
  std::memcpy(&value, &result, sizeof(T));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, std::source_location where = std::source_location::current()) {
  return __shfl_sync(mask, value, (static_cast<int>(threadIdx.x) & 31) ^ lanes, where);
}

inline unsigned __ballot_sync(unsigned mask, bool vote, std::source_location where = std::source_location::current()) {
  return shim::ballot(mask, vote, where);
}

inline bool __any_sync(unsigned mask, bool vote, std::source_location where = std::source_location::current()) {
  return shim::ballot(mask, vote, where) != 0;
}

inline void __syncthreads(std::source_location where = std::source_location::current()) { shim::barrier(where); }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorECCUncorrectable = 214,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchTimeout = 702,
  cudaErrorAssert = 710,
  cudaErrorHardwareStackError = 714,
  cudaErrorIllegalInstruction = 715,
  cudaErrorMisalignedAddress = 716,
  cudaErrorInvalidAddressSpace = 717,
  cudaErrorInvalidPc = 718,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = void*;

namespace shim {

inline cudaError_t last_error = cudaSuccess;  // as CUDA remembers it, until somebody fetches it
inline cudaError_t refusal = cudaSuccess;     // what every launch is refused with

}  // namespace shim

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = shim::last_error;
  shim::last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorIllegalAddress ? "an illegal memory access was encountered" : "the launch was refused";
}

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* configuration, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const bool possible = configuration->gridDim.x >= 1 && configuration->gridDim.x <= 0x7fffffffu &&
                        configuration->blockDim.x >= 1 && configuration->blockDim.x <= 1024 &&
                        configuration->dynamicSmemBytes <= shim::kBlockMemoryBytes;
  if (!possible || shim::refusal != cudaSuccess) {
    shim::last_error = possible ? shim::refusal : cudaErrorInvalidValue;
    return shim::last_error;
  }
  shim::run_grid(configuration->gridDim.x, configuration->blockDim.x, configuration->dynamicSmemBytes,
                 [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}
