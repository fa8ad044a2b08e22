// The rows of one launch's table, by value in the kernel's parameters, and where their numbers lie in memory.
//
// A tensor is walked in lines: planar, a line is a channel and its columns are positions; interleaved (channels
// innermost in memory), a line is a position and its columns are channels. Blocks are numbered row after row.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "memory.cuh"

namespace frs::cuda {

constexpr uint32_t MAX_ROWS = 16;  // keeps the parameters below 4 KB, all that drivers before CUDA 12.1 take

template <class E>
struct Table {
  E rows[MAX_ROWS];
  uint32_t starts[MAX_ROWS + 1];  // first block of a row, then the number of blocks
  uint32_t count;
};
constexpr int64_t PARAMETER_BYTES = 4096;

// The row of a block, or `count` in the one block that a launch without any work has.
template <class E>
__device__ __forceinline__ uint32_t find_row(const Table<E>& table, uint32_t block) {
  uint32_t row = 0;
  while (row < table.count && block >= table.starts[row + 1]) ++row;
  return row;
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

template <class T>
__device__ __forceinline__ int64_t bytes_as(DType dtype) {
  if constexpr (std::is_same_v<T, Any>)
    return bytes_of(dtype);
  else
    return sizeof(T);
}

template <class T>
__device__ __forceinline__ char* address(const Operand& operand, int64_t at) {
  return static_cast<char*>(operand.data) + at * bytes_as<T>(operand.dtype);
}

// n / d where n d < 2^32, given divider(d): a multiplication.
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

inline bool is_aligned(const View& view, int64_t width) {
  return reinterpret_cast<uintptr_t>(view.data) % (width * bytes_of(view.dtype)) == 0;
}

// True if `width` neighbours in a line can be moved at once, wherever a line starts. Wide walks step from line to line
// with 32 bits, up to 64 lines at once.
inline bool is_wide(const Level& level, const View& view, int64_t width) {
  if (view.data == nullptr) return true;
  if (view.p < 0) return false;
  const bool i = level.interleaved;
  const int64_t length = i ? level.c : level.positions(), lines = i ? level.positions() : level.c;
  const int64_t step = i ? view.c : view.p, line = i ? view.p : view.c;
  return is_aligned(view, width) && (step == 1 || length == 1) && length % width == 0 &&
         (lines == 1 || (line % width == 0 && line >= 0 && line <= UINT32_MAX / 64 / bytes_of(view.dtype))) &&
         (level.n == 1 || view.n % width == 0);
}

// True if an image is one run of numbers, channel after channel, that can be moved `width` at once.
inline bool is_flat(const Level& level, const View& view, int64_t width) {
  if (view.data == nullptr) return true;
  const int64_t positions = level.positions();
  return !level.interleaved && is_aligned(view, width) && (view.p == 1 || positions == 1) &&
         (level.c == 1 || view.c == positions) && level.c * positions % width == 0 &&
         (level.n == 1 || view.n % width == 0);
}

inline void check_sizes(const Level& level, const char* verb) {
  if (level.positions() > INT32_MAX || level.c > INT32_MAX || level.n > INT32_MAX)
    throw std::runtime_error(std::string("frs_kernels ") + verb + ": a level of more than 2^31 positions or channels");
}

}  // namespace frs::cuda
