// How a verb reaches the device: block size, launch, errors, and how one launch begins before another has ended.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
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

// What of the current device is asked for once: the question costs more than a launch.
template <cudaDeviceAttr ATTRIBUTE>
int32_t device_attribute(const char* verb) {
  constexpr int32_t MOST = 64;
  static std::atomic<int32_t> known[MOST];
  int device = 0, value = 0;
  check(cudaGetDevice(&device), verb);
  if (device < MOST && (value = known[device].load(std::memory_order_relaxed))) return value;
  check(cudaDeviceGetAttribute(&value, ATTRIBUTE, device), verb);
  if (device < MOST) known[device].store(value, std::memory_order_relaxed);
  return value;
}

inline int32_t multiprocessors(const char* verb) { return device_attribute<cudaDevAttrMultiProcessorCount>(verb); }

// Programmatic dependent launch: from sm_90 on a launch may begin while the one before it drains, as far as `wait`.
// FRS_PDL=0 switches it off.
inline bool can_overlap(const char* verb) {
  static const bool asked = [] {
    const char* value = std::getenv("FRS_PDL");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  return asked && device_attribute<cudaDevAttrComputeCapabilityMajor>(verb) >= 9;
}

// Every block of the launch before has come so far: the next one's blocks may take the places that are left.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until the launch before has ended and what it wrote is seen. At once where the launch did not overlap.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

enum class Begin { after_previous, beside_previous };

template <class... P, class... A>
void launch(const char* verb, void (*kernel)(P...), int64_t blocks, void* stream, Begin begin, const A&... arguments) {
  if (blocks > INT32_MAX) throw std::runtime_error(std::string("frs_kernels ") + verb + ": too many blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<uint32_t>(blocks));
  config.blockDim = dim3(THREADS);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  if (begin == Begin::beside_previous && can_overlap(verb)) {
    config.attrs = &overlap;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, arguments...), verb);
}

}  // namespace frs::cuda
