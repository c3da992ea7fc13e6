// What crosses from the operators to the kernels: plain pointers and sizes, and one table of functions per
// instruction set. kernels.cpp is compiled once for each; instruction_set.cpp chooses at load time.
#pragma once

#include <cstdint>

#include "attention_calls.h"
#include "head_calls.h"
#include "sample_calls.h"

namespace stable_sam {

// A kernel handles [first, last) of the B * H rows, or of what it says it counts.
using ForwardKernel = void (*)(const ForwardCall&, int64_t first, int64_t last);
using BackwardKernel = void (*)(const BackwardCall&, int64_t first, int64_t last);

struct Kernels {
  const char* instruction_set;
  int64_t sample_bytes[4];  // bytes of one PixelSample, by ElementType like all below
  ForwardKernel sample[4];
  BackwardKernel locate[4];
  BackwardKernel gather[4];
  BackwardKernel finish[4];
  BackwardKernel reduce[4];
  HeadKernels head;
  AttentionKernels attention;
};

// The table for the best instruction set this processor has.
const Kernels& kernels();

}  // namespace stable_sam
