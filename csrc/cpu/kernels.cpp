// All kernels for one instruction set. setup.py compiles this file once for each, with its own flags and
// with STABLE_SAM_INSTRUCTION_SET naming it.
#include <type_traits>

#include "sample_forward.h"

namespace stable_sam {

#define STABLE_SAM_NAME_OF(name) #name
#define STABLE_SAM_NAME(name) STABLE_SAM_NAME_OF(name)

namespace STABLE_SAM_INSTRUCTION_SET {

// In the order of ElementType: float, double, half, bfloat16.
extern const Kernels kKernels;
const Kernels kKernels = {
    STABLE_SAM_NAME(STABLE_SAM_INSTRUCTION_SET),
    {sizeof(PixelSample<float>), sizeof(PixelSample<double>), sizeof(PixelSample<Half>), sizeof(PixelSample<BFloat16>)},
    {sample_rows<float>, sample_rows<double>, sample_rows<Half>, sample_rows<BFloat16>},
    {},
    {},
    {},
};

}  // namespace STABLE_SAM_INSTRUCTION_SET
}  // namespace stable_sam
