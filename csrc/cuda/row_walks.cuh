// How `moments` and `moments_backward` go over a level whose channels are rows.
//
//     planar       some threads of a warp take a run of positions of one channel of an image: packets where memory is
//                  aligned, and one by one what is left at the run's two ends. Rows of odd length need nothing else.
//     interleaved  a block takes a few packets of channels in many positions of an image, a thread one of the packets
//     in
//                  every so-manieth position.
//
// A run, or one channel of a tile, is a part of a row. A block's parts are all of one group of rows, so that the block
// which comes last of a group knows all of its rows.
#pragma once

#include "levels.cuh"
#include "row_losses.h"

namespace frs::cuda {

constexpr uint32_t UNDER_WAY = 4;  // packets of each operand that a thread keeps under way, or half as many
// Interleaved, the channels of a tile: 64 bytes of them in 16 bits. The fewer, the fewer bytes of sums a number takes,
// and the sooner a group of rows is added up.
constexpr uint32_t MOST_COLUMNS = 32;

struct RowLevel {
  Operand student, teacher, grad;
  int64_t first, first_part;  // the numbers of its first row, and of that row's first part
  double scale;
  uint32_t images, channels, positions;
  uint32_t width;           // to split positions by, or 0
  uint32_t all_rows, rows;  // of the level; of a group
  uint32_t parts;           // of a row
  uint32_t tiles, length;   // of an image along its positions; positions of a tile
  uint32_t groups, blocks;  // of the level; of a group
  uint32_t across, chunks;  // interleaved: packets side by side in a tile; tiles side by side
  uint32_t entry;           // of the call's levels
  uint8_t log_lanes;        // planar: threads of a run
  uint8_t log_finishers;    // threads that add up the parts of a row
  bool interleaved, wide;
};
using RowTable = Table<RowLevel>;

struct Place {
  uint32_t group, block;  // of the group
};

// Interleaved, groups lie side by side in memory and are read together; planar, the runs of a row follow each other.
__device__ __forceinline__ Place place_of(const RowLevel& level, uint32_t block) {
  if (level.interleaved) return {block % level.groups, block / level.groups};
  return {block / level.blocks, block % level.blocks};
}

struct RowRange {
  uint32_t first, count;  // first: of the level
};

__device__ __forceinline__ RowRange rows_of(const RowLevel& level, uint32_t group) {
  if (!level.interleaved) return {group * level.rows, min(level.rows, level.all_rows - group * level.rows)};
  const uint32_t image = group / level.chunks, c = (group - image * level.chunks) * level.rows;
  return {image * level.channels + c, min(level.rows, level.channels - c)};
}

// What a thread goes over, beside others.
struct Spot {
  uint32_t row, part;        // of the level; of the row. Interleaved, the row of the first channel of a packet
  uint32_t n, c;             // image and channel
  uint32_t begin, end;       // the positions of all
  uint32_t shift;            // how many numbers before the channel's first one memory is aligned
  uint32_t thread, threads;  // which of how many
  bool inside;
};

template <class S, int V, bool PER_IMAGE, bool INTERLEAVED>
__device__ __forceinline__ Spot spot_of(const RowLevel& level, const Place& place) {
  Spot at{};
  if constexpr (INTERLEAVED) {
    const RowRange rows = rows_of(level, place.group);
    at.threads = THREADS / level.across, at.thread = threadIdx.x / level.across;
    const uint32_t c = (threadIdx.x - at.thread * level.across) * V;
    at.row = rows.first + c, at.part = place.block;
    at.inside = at.thread < at.threads && c < rows.count && at.part < level.parts;
  } else {
    const uint32_t run = place.block * (THREADS >> level.log_lanes) + (threadIdx.x >> level.log_lanes);
    const uint32_t row = level.parts ? run / level.parts : 0;
    at.threads = 1u << level.log_lanes, at.thread = threadIdx.x & (at.threads - 1);
    at.row = place.group * level.rows + row, at.part = run - row * level.parts;
    at.inside = level.parts && row < level.rows && at.row < level.all_rows;
  }
  at.n = PER_IMAGE ? at.row / level.channels : at.part / level.tiles;
  at.c = PER_IMAGE ? at.row - at.n * level.channels : at.row;
  const uint32_t tile = PER_IMAGE ? at.part : at.part - at.n * level.tiles, begin = tile * level.length;
  if (V > 1 && !INTERLEAVED && at.inside) {
    const int64_t number = at.n * level.student.n + at.c * level.student.c;
    at.shift = (reinterpret_cast<uintptr_t>(level.student.data) / sizeof(S) + number) % V;
  }
  at.begin = max(begin, at.shift) - at.shift;
  at.end = tile + 1 == level.tiles ? level.positions : begin + level.length - at.shift;
  return at;
}

// V numbers of student and teacher.
template <class S_, class T_, class A_, int V_>
struct Both {
  using S = S_;
  using T = T_;
  using A = A_;
  static constexpr int V = V_;
  Held<S, A, V> s;
  Held<T, A, V> t;
};

// Where a spot's channel begins in a tensor, and where a position is there.
template <class T, int V>
struct Line {
  const Operand& operand;
  char* start;
  int64_t stride;
  uint32_t width;

  __device__ __forceinline__ Line(const Operand& o, const Spot& at, uint32_t width)
      : operand(o), start(address<T>(o, at.n * o.n + at.c * o.c)), stride(o.w * bytes_as<T>(o.dtype)), width(width) {}
  __device__ __forceinline__ char* at(uint32_t p) const {
    if (V > 1) return start + p * stride;  // what moves packets has one stride
    return start + position_offset(operand, p, width) * bytes_as<T>(operand.dtype);
  }
  template <Use USE, class A, int COUNT>
  __device__ __forceinline__ void fetch(Held<T, A, COUNT>& held, uint32_t p) const {
    held.template fetch<USE>(at(p), 0, operand.dtype);
  }
};

// visit(both, taken, p, step): packets both[0], ..., both[taken - 1], the first of which is at position p, each `step`
// positions after the one before.
template <class B, uint32_t U, bool INTERLEAVED, class F>
__device__ __forceinline__ void walk(const RowLevel& level, const Spot& at, const F& visit) {
  constexpr uint32_t SIZE = INTERLEAVED ? 1 : B::V;  // positions of a packet
  using A = typename B::A;
  const Line<typename B::S, B::V> s(level.student, at, level.width);
  const Line<typename B::T, B::V> t(level.teacher, at, level.width);
  const uint32_t begin = at.begin + at.shift, end = at.end + at.shift;  // counted from where memory is aligned
  const uint32_t first = (begin + SIZE - 1) / SIZE, last = end / SIZE;
  if constexpr (SIZE > 1) {
    const uint32_t before = min(first * SIZE, end) - begin, after = last >= first ? end - last * SIZE : 0;
    for (uint32_t i = at.thread; i < before + after; i += at.threads) {
      const uint32_t p = (i < before ? begin + i : last * SIZE + i - before) - at.shift;
      Both<typename B::S, typename B::T, A, 1> one[1];
      s.template fetch<Use::once>(one[0].s, p), t.template fetch<Use::once>(one[0].t, p);
      visit(one, 1u, p, 1u);
    }
  }
  for (uint32_t i = first + at.thread; i < last; i += U * at.threads) {
    B both[U];
    uint32_t taken = 0;
#pragma unroll
    for (uint32_t u = 0; u < U; ++u) {
      const uint32_t packet = i + u * at.threads, p = packet * SIZE - at.shift;
      if (u > 0 && packet >= last) continue;
      s.template fetch<Use::once>(both[u].s, p), t.template fetch<Use::once>(both[u].t, p);
      taken = u + 1;
    }
    visit(both, taken, i * SIZE - at.shift, at.threads * SIZE);
  }
}

}  // namespace frs::cuda
