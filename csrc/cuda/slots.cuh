// Sums that come out bitwise the same every run, in the launch that makes them.
//
// Every block stores its partial sum in a slot of its own. The block that finishes last, known by an integer counter,
// adds the slots of each row of the table in a fixed order, in fp64. No float atomics, no second launch.
#pragma once

#include "levels.cuh"

namespace frs::cuda {

struct Workspace {
  uint32_t* counter;  // zero when a launch starts; its last block puts it back
  double* total;      // zero at first: what the launches of a call add up, beside the values of its terms
  double* terms;
  double* slots;  // one a block
};

// Counter, total and terms, in units of 16 bytes.
inline int64_t head_bytes(int64_t terms) { return 16 + (terms + 1) / 2 * 16; }

inline int64_t workspace_bytes(int64_t blocks, int64_t terms) {
  return head_bytes(terms) + blocks * static_cast<int64_t>(sizeof(double));
}

inline Workspace workspace_at(void* memory, int64_t terms) {
  auto* head = static_cast<double*>(memory);
  return {static_cast<uint32_t*>(memory), head + 1, head + 2, head + head_bytes(terms) / 8};
}

inline void reset(void* memory, int64_t terms, const char* verb, void* stream) {
  check(cudaMemsetAsync(memory, 0, head_bytes(terms), static_cast<cudaStream_t>(stream)), verb);
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = WARP / 2; offset; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;  // in lane 0
}

// Counts this block, after what it has stored. A release alone: a full fence in every block would also empty its L1.
__device__ __forceinline__ uint32_t count_block(uint32_t* counter) {
#if defined(__CUDA_ARCH__)
  uint32_t before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
#else
  return atomicAdd(counter, 1u);
#endif
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
    is_last = count_block(workspace.counter) == gridDim.x - 1;
    if (is_last) *workspace.counter = 0;
  }
  __syncthreads();
  if (is_last) __threadfence();  // the count before the reads of the others' slots
  return is_last;
}

// In the last block: the sums of the slots of every row of the table, given to write(row, sum) by a thread each, and
// left in shared memory: sums[row]. A table is what has `starts` and `count`. Warps take chunks of slots in turn, so
// that short rows do not wait for one another: ten rows, one after another, took 2 us more of a step of 24 (H200).
template <class T, class F>
__device__ __forceinline__ const double* sum_rows(const Workspace& workspace, const T& table, const F& write) {
  __shared__ double parts[MAX_ROWS][WARPS];
  __shared__ double sums[MAX_ROWS];
  constexpr uint32_t UNDER_WAY = 8, CHUNK = UNDER_WAY * WARP;
  const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  uint32_t turn = 0;
  for (uint32_t row = 0; row < table.count; ++row) {
    double sum = 0;
    bool took = false;  // the same in a whole warp
    const uint32_t last = table.starts[row + 1];
    for (uint32_t slot = table.starts[row] + lane; slot - lane < last; slot += CHUNK) {
      if (turn++ % WARPS != warp) continue;
      took = true;
      double held[UNDER_WAY];
      // __ldcg goes past L1, which may hold a line from before the others' stores.
#pragma unroll
      for (uint32_t i = 0; i < UNDER_WAY; ++i)
        held[i] = slot + i * WARP < last ? __ldcg(workspace.slots + slot + i * WARP) : 0;
#pragma unroll
      for (uint32_t i = 0; i < UNDER_WAY; ++i) sum += held[i];
    }
    if (took) sum = warp_sum(sum);
    if (lane == 0) parts[row][warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x < table.count) {
    double sum = 0;
    for (uint32_t w = 0; w < WARPS; ++w) sum += parts[threadIdx.x][w];
    sums[threadIdx.x] = sum;
    write(threadIdx.x, sum);
  }
  __syncthreads();
  return sums;
}

}  // namespace frs::cuda
