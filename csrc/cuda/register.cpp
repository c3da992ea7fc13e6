// Hands the CUDA operators to PyTorch's dispatcher.
#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(stable_sam_cuda, CUDA, library) {
  library.impl("deformable_sample", TORCH_BOX(&stable_sam::deformable_sample_cuda));
  library.impl("deformable_sample_backward", TORCH_BOX(&stable_sam::deformable_sample_backward_cuda));
}
