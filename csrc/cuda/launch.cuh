// How a verb reaches the device: block size, launch, errors.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

// A test that runs a block as so many host threads asks for fewer of them, and for fewer and longer blocks.
#if !defined(FRS_THREADS)
#define FRS_THREADS 128
#define FRS_BLOCKS 2048
#endif

namespace frs::cuda {

constexpr uint32_t THREADS = FRS_THREADS;
constexpr uint32_t WARP = 32;
constexpr uint32_t WARPS = THREADS / WARP;
static_assert(THREADS % WARP == 0 && THREADS <= 256);  // more would make tiles too large for `divide`
constexpr int64_t BLOCKS = FRS_BLOCKS;  // enough to fill a device of 100 to 200 multiprocessors a few times over

inline void check(cudaError_t error, const char* verb) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next verb, or PyTorch's next kernel, would report this error as its own
  throw std::runtime_error(std::string("frs_kernels ") + verb + ": " + cudaGetErrorString(error));
}

template <class... P, class... A>
void launch(const char* verb, void (*kernel)(P...), int64_t blocks, void* stream, const A&... arguments) {
  if (blocks > INT32_MAX) throw std::runtime_error(std::string("frs_kernels ") + verb + ": too many blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<uint32_t>(blocks));
  config.blockDim = dim3(THREADS);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), verb);
}

// Multiprocessors of the current device, asked for once: the question costs more than a launch.
inline int32_t multiprocessors(const char* verb) {
  constexpr int32_t MOST = 64;
  static std::atomic<int32_t> known[MOST];
  int device = 0, count = 0;
  check(cudaGetDevice(&device), verb);
  if (device < MOST && (count = known[device].load(std::memory_order_relaxed))) return count;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), verb);
  if (device < MOST) known[device].store(count, std::memory_order_relaxed);
  return count;
}

}  // namespace frs::cuda
