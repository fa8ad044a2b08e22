// The device of a library: CUDA with USE_CUDA, else the CPU. Where its work goes, and what is done with new memory.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "tensors.h"

#ifdef USE_CUDA
#define FRS_KEY CUDA
#else
#define FRS_KEY CPU
#endif

namespace frs {

void prefer_huge_pages(void* data, int64_t bytes);  // csrc/cpu/backend.cpp

namespace {

struct Queue {  // the device and stream that the tensors' work goes to
#ifdef USE_CUDA
  explicit Queue(const Given& like) : guard(like.device.index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.device.index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
#else
  explicit Queue(const Given&) {}
#endif
  void* stream = nullptr;
};

// Of a gradient that has just been allocated.
inline void prepare([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifndef USE_CUDA
  prefer_huge_pages(data, bytes);
#endif
}

}  // namespace
}  // namespace frs
