// Sums that come out bitwise the same every run, in the launch that makes them.
//
// Every block stores its partial sum in a slot of its own. The block that finishes last, known by an integer counter,
// adds each level's slots in a fixed order, in fp64. No float atomics, no second launch.
#pragma once

#include "levels.cuh"

namespace frs::cuda {

struct Workspace {
  uint32_t* counter;  // zero when the launch starts
  double* carry;      // the total of the launches before this one
  double* slots;      // one a block
};

constexpr int64_t HEAD_BYTES = 16;  // counter and carry

inline int64_t workspace_bytes(int64_t blocks) { return HEAD_BYTES + blocks * static_cast<int64_t>(sizeof(double)); }

inline Workspace workspace_at(void* memory) {
  auto* head = static_cast<double*>(memory);
  return {static_cast<uint32_t*>(memory), head + 1, head + 2};
}

inline void reset(const Workspace& workspace, const char* verb, void* stream) {
  check(cudaMemsetAsync(workspace.counter, 0, sizeof(uint32_t), static_cast<cudaStream_t>(stream)), verb);
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = WARP / 2; offset; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;  // in lane 0
}

// Stores the sum of the block's partials; true in the block that comes last, which then sees all slots.
__device__ __forceinline__ bool store_partial(const Workspace& workspace, uint32_t block, double partial) {
  __shared__ double sums[WARPS];
  __shared__ bool is_last;
  partial = warp_sum(partial);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = partial;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (uint32_t warp = 0; warp < WARPS; ++warp) sum += sums[warp];
    workspace.slots[block] = sum;
    __threadfence();  // the slot before the count
    is_last = atomicAdd(workspace.counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last) __threadfence();  // the count before the reads of the others' slots
  return is_last;
}

// In the last block: the sum of every level's slots, given to write(level, sum) by one thread each. Returns the sum of
// all of them in thread 0.
template <class E, class F>
__device__ __forceinline__ double sum_levels(const Workspace& workspace, const Table<E>& table, const F& write) {
  __shared__ double sums[MAX_LEVELS][WARPS];
  for (uint32_t level = 0; level < table.count; ++level) {
    double sum = 0;
    const uint32_t last = table.starts[level + 1];
    // Unrolled: a thousand slots are 8 a thread, one trip to L2 instead of 8. __ldcg goes past L1, which may hold a
    // line from before the others' stores.
#pragma unroll 8
    for (uint32_t slot = table.starts[level] + threadIdx.x; slot < last; slot += THREADS)
      sum += __ldcg(workspace.slots + slot);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) sums[level][threadIdx.x / WARP] = sum;
  }
  __syncthreads();
  auto sum_of = [&](uint32_t level) {
    double sum = 0;
    for (uint32_t warp = 0; warp < WARPS; ++warp) sum += sums[level][warp];
    return sum;
  };
  if (threadIdx.x < table.count) write(threadIdx.x, sum_of(threadIdx.x));
  double total = 0;
  if (threadIdx.x == 0)
    for (uint32_t level = 0; level < table.count; ++level) total += sum_of(level);
  return total;
}

}  // namespace frs::cuda
