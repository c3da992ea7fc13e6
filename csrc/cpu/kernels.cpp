// All kernels for one instruction set. build_tools/libraries.py compiles this file once for each, with its own flags
// and with STABLE_SAM_INSTRUCTION_SET naming it.
#include <type_traits>

#include "attention_backward.h"
#include "attention_forward.h"
#include "head_backward.h"
#include "head_forward.h"
#include "sample_backward.h"
#include "sample_forward.h"

namespace stable_sam {

#define STABLE_SAM_NAME_OF(name) #name
#define STABLE_SAM_NAME(name) STABLE_SAM_NAME_OF(name)

namespace STABLE_SAM_INSTRUCTION_SET {

#define STABLE_SAM_FOR_EACH_TYPE(kernel) {kernel<float>, kernel<double>, kernel<Half>, kernel<BFloat16>}

// Within a line in the order of ElementType.
extern const Kernels kKernels;
const Kernels kKernels = {
    STABLE_SAM_NAME(STABLE_SAM_INSTRUCTION_SET),
    {sizeof(PixelSample<float>), sizeof(PixelSample<double>), sizeof(PixelSample<Half>), sizeof(PixelSample<BFloat16>)},
    STABLE_SAM_FOR_EACH_TYPE(sample_rows),
    STABLE_SAM_FOR_EACH_TYPE(locate_rows),
    STABLE_SAM_FOR_EACH_TYPE(gather_rows),
    STABLE_SAM_FOR_EACH_TYPE(finish_rows),
    STABLE_SAM_FOR_EACH_TYPE(reduce_alpha),
    {
        STABLE_SAM_FOR_EACH_TYPE(prepare_head),
        STABLE_SAM_FOR_EACH_TYPE(head_forward),
        STABLE_SAM_FOR_EACH_TYPE(head_backward),
        STABLE_SAM_FOR_EACH_TYPE(reduce_head_gradients),
    },
    {
        STABLE_SAM_FOR_EACH_TYPE(attend),
        STABLE_SAM_FOR_EACH_TYPE(merge_attention),
        STABLE_SAM_FOR_EACH_TYPE(attention_backward),
        STABLE_SAM_FOR_EACH_TYPE(merge_row_gradients),
        STABLE_SAM_FOR_EACH_TYPE(add_to_sums),
        STABLE_SAM_FOR_EACH_TYPE(round_sums),
    },
};

}  // namespace STABLE_SAM_INSTRUCTION_SET
}  // namespace stable_sam
