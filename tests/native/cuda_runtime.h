// CUDA on the host, as much of it as csrc/cuda uses: found before the real header, it makes g++ compile the same .cu
// files. A thread of a block is a host thread; the blocks of a launch run one after another, in order.
//
// Barriers and shuffles are pthread barriers, so that the thread sanitizer sees what they order, and what they do not.
// Blocks do not overlap: the order that __threadfence gives between them is not tested here.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

inline constexpr unsigned WARP = 32;

struct Barrier {
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }
  pthread_barrier_t barrier;
};

struct Warp {
  Barrier barrier{WARP};
  char exchange[WARP][8];
};

// As many host threads as a block has, kept from launch to launch.
class Block {
 public:
  explicit Block(unsigned threads) : barrier(threads), gate(threads + 1), warps(threads / WARP) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
    for (unsigned i = 0; i < threads; ++i) pool.emplace_back([this, i, threads] { work(i, threads); });
  }
  ~Block() {
    kernel = nullptr;
    gate.wait();
    for (auto& thread : pool) thread.join();
  }
  void run(unsigned blocks, std::function<void()> what) {
    kernel = std::move(what);
    grid = blocks;
    gate.wait();
    gate.wait();
  }

  Barrier barrier, gate;
  std::vector<std::unique_ptr<Warp>> warps;

 private:
  void work(unsigned thread, unsigned threads) {
    threadIdx = dim3(thread);
    blockDim = dim3(threads);
    for (;;) {
      gate.wait();
      if (!kernel) return;
      gridDim = dim3(grid);
      for (unsigned block = 0; block < grid; ++block) {
        blockIdx = dim3(block);
        kernel();
        barrier.wait();
      }
      gate.wait();
    }
  }

  std::vector<std::thread> pool;
  std::function<void()> kernel;
  unsigned grid = 0;
};

inline Block& block(unsigned threads) {
  static Block one(threads);
  if (one.warps.size() * WARP != threads) std::abort();
  return one;
}

inline Block& block() { return block(blockDim.x); }

inline int launches = 0;

}  // namespace host

inline void __syncthreads() { host::block().barrier.wait(); }
inline void __threadfence() {}

namespace host {

// What a lane of this warp has, or this lane's own where there is no such lane.
template <class T>
T lane_value(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) std::abort();
  Warp& warp = *block().warps[threadIdx.x / WARP];
  std::memcpy(warp.exchange[threadIdx.x % WARP], &value, sizeof(T));
  warp.barrier.wait();
  if (from < WARP) std::memcpy(&value, warp.exchange[from], sizeof(T));
  warp.barrier.wait();
  return value;
}

}  // namespace host

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return host::lane_value(mask, value, threadIdx.x % host::WARP + delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned other) {
  return host::lane_value(mask, value, (threadIdx.x % host::WARP) ^ other);
}

inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }

template <class T>
T checked(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) {
    std::fprintf(stderr, "misaligned access of %zu bytes\n", sizeof(T));
    std::abort();
  }
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return checked(at);
}
template <class T>
T __ldcg(const T* at) {
  return checked(at);
}
template <class T>
void __stcs(T* at, T value) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) {
    std::fprintf(stderr, "misaligned store of %zu bytes\n", sizeof(T));
    std::abort();
  }
  *at = value;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline float __uint_as_float(unsigned bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
using cudaStream_t = struct CUstream_st*;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  return std::memset(at, value, bytes), cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... arguments) {
  if (config->gridDim.x == 0 || config->gridDim.x > 0x7fffffffu) return cudaErrorInvalidConfiguration;
  ++host::launches;
  host::block(config->blockDim.x).run(config->gridDim.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}
