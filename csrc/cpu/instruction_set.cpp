// Chooses the kernels for this processor once, when the library is loaded.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace stable_sam {

// One table for each compilation of kernels.cpp; build_tools/libraries.py says which there are.
namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

namespace {

// PyTorch's own variable, ATEN_CPU_CAPABILITY, may ask for less than the processor has: default, avx2 or avx512.
[[maybe_unused]] bool allowed(const char* instruction_set) {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (limit == nullptr || std::strcmp(limit, "avx512") == 0) return true;
  return std::strcmp(limit, "avx2") == 0 && std::strcmp(instruction_set, "avx2") == 0;
}

const Kernels& best_kernels() {
#if defined(STABLE_SAM_HAS_AVX512)
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return avx512::kKernels;
  }
#endif
#if defined(STABLE_SAM_HAS_AVX2)
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return avx2::kKernels;
  }
#endif
  return baseline::kKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = best_kernels();
  return chosen;
}

}  // namespace stable_sam

// For `stable-sam doctor`: the name of the instruction set in use.
extern "C" __attribute__((visibility("default"))) const char* stable_sam_cpu_instruction_set() {
  return stable_sam::kernels().instruction_set;
}
