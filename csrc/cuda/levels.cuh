// The levels of one launch, by value in the kernel's parameters, and how a level is cut into tiles.
//
// A level is walked in rows: planar, a row is a channel and its columns are positions; interleaved (channels innermost
// in memory), a row is a position and its columns are channels. Blocks are numbered level after level.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "memory.cuh"

namespace frs::cuda {

constexpr uint32_t MAX_LEVELS = 16;  // keeps the parameters below 4 KB, all that drivers before CUDA 12.1 take

template <class E>
struct Table {
  E levels[MAX_LEVELS];
  uint32_t starts[MAX_LEVELS + 1];  // first block of a level, then the number of blocks
  uint32_t count;
};
constexpr int64_t PARAMETER_BYTES = 4096;

// The level of a block, or `count` in the one block that a launch without any work has.
template <class E>
__device__ __forceinline__ uint32_t find_level(const Table<E>& table, uint32_t block) {
  uint32_t level = 0;
  while (level < table.count && block >= table.starts[level + 1]) ++level;
  return level;
}

struct Operand {
  void* data;
  int64_t n, c, h, w;  // strides in elements; where positions have one stride it is w, and h is unused
  DType dtype;
};

// The offset of position p: `width` is 0 where positions have one stride, else they are split into (h, w).
__device__ __forceinline__ int64_t position_offset(const Operand& operand, uint32_t p, uint32_t width) {
  if (width == 0) return p * operand.w;
  return p / width * operand.h + p % width * operand.w;
}

// n / d for n, d < 2^16, given divider(d): a multiplication.
inline uint32_t divider(uint32_t d) { return d == 1 ? 0 : UINT32_MAX / d + 1; }
__device__ __forceinline__ uint32_t divide(uint32_t n, uint32_t divider) { return divider ? __umulhi(n, divider) : n; }

inline uint32_t cdiv(int64_t a, int64_t b) { return static_cast<uint32_t>((a + b - 1) / b); }

inline bool is_empty(const Level& level) { return level.n == 0 || level.h == 0 || level.w == 0; }

// False where some operand has no one stride of positions, so that all are split into (h, w).
template <class... Views>
bool has_positions(const Views&... views) {
  return (... && (views.data == nullptr || views.p >= 0));
}

inline Operand operand_of(const View& view, bool has_positions) {
  return {view.data, view.n, view.c, view.h, has_positions ? view.p : view.w, view.dtype};
}

// True if `width` neighbours in a row can be moved at once, wherever a row starts. The distance of rows has to fit in
// 32 bits too, as wide walks multiply it by a row in one instruction.
inline bool is_wide(const Level& level, const View& view, int64_t width) {
  if (view.data == nullptr) return true;
  if (view.p < 0) return false;
  const int64_t bytes = width * bytes_of(view.dtype);
  const bool i = level.interleaved;
  const int64_t length = i ? level.c : level.positions(), rows = i ? level.positions() : level.c;
  const int64_t step = i ? view.c : view.p, row = i ? view.p : view.c;
  return reinterpret_cast<uintptr_t>(view.data) % bytes == 0 && (step == 1 || length == 1) && length % width == 0 &&
         (rows == 1 || (row % width == 0 && row <= INT32_MAX)) && (level.n == 1 || view.n % width == 0);
}

inline void check_sizes(const Level& level, const char* verb) {
  if (level.positions() > INT32_MAX || level.c > INT32_MAX || level.n > INT32_MAX)
    throw std::runtime_error(std::string("frs_kernels ") + verb + ": a level of more than 2^31 positions or channels");
}

// The levels of a verb in groups of MAX_LEVELS, one launch each; one group where there is no level at all.
template <class F>
void each_group(int64_t count, const F& f) {
  int64_t first = 0;
  do {
    f(first, std::min<int64_t>(count - first, MAX_LEVELS));
    first += MAX_LEVELS;
  } while (first < count);
}

}  // namespace frs::cuda
