// Panels: some channels by COLUMN positions of a tile, a channel's positions neighbours, whatever the tensor's strides.
#pragma once

#include "rows.h"

namespace frs::FRS_ISA {

// Some channels and positions of a tile.
struct Part {
  const Tile* tile;
  int64_t c0, channels, p0, positions;

  Part from(int64_t p) const { return {tile, c0, channels, p0 + p, positions - p}; }
};

// Call f(at, step, c, p, count) for each part whose numbers lie `step` apart in memory, from element `at`: channels of
// position p from c on where the level is interleaved, else positions of channel c from p on.
template <class F>
static FRS_INLINE void each_line(const View& v, const Part& part, const F& f) {
  const int64_t c_end = part.c0 + part.channels, p_end = part.p0 + part.positions;
  if (part.tile->level->interleaved) {
    each_span(v, Row{part.tile, part.c0, c_end, part.p0, p_end},
              [&](int64_t at, int64_t step, int64_t to, int64_t count) { f(at, step, 0, to / count, count); });
  } else {
    for (int64_t c = part.c0; c < c_end; ++c)
      each_span(v, Row{part.tile, c, c + 1, part.p0, p_end},
                [&](int64_t at, int64_t step, int64_t to, int64_t count) { f(at, step, c - part.c0, to, count); });
  }
}

template <int K = 1>
FRS_INLINE void transpose(F32 (&rows)[WIDTH]) {
  I32 low = {}, high = {};
  for (int lane = 0; lane < WIDTH; ++lane) {
    low[lane] = lane & K ? WIDTH + lane - K : lane;
    high[lane] = lane & K ? WIDTH + lane : lane + K;
  }
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i) {
    if (i & K) continue;
    const F32 a = rows[i], b = rows[i + K];
    rows[i] = both_lanes(a, b, low), rows[i + K] = both_lanes(a, b, high);
  }
  if constexpr (2 * K < WIDTH) transpose<2 * K>(rows);
}

// Whole squares of WIDTH positions by WIDTH channels that are neighbours in memory; returns how many positions have
// been dealt with. The last channels' square overlaps the one before.
template <bool IN, class N>
static int64_t each_square(const View& v, const Part& part, float* panel) {
  const int64_t whole = part.positions / WIDTH * WIDTH;
  N* const corner = static_cast<N*>(v.data) + offset(v, Row{part.tile, part.c0, 0, part.p0, 0}, part.c0, part.p0);
  for (int64_t p = 0; p < whole; p += WIDTH)
    for (int64_t c = 0; c < part.channels; c += WIDTH) {
      const int64_t first = at_most(c, part.channels - WIDTH);
      N* const at = corner + p * v.p + first;
      float* const to = panel + first * COLUMN + p;
      F32 rows[WIDTH];
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i) rows[i] = IN ? load_wide(at + i * v.p) : load<F32>(to + i * COLUMN);
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i) {
        if (IN)
          store(to + i * COLUMN, rows[i]);
        else
          store_narrow(at + i * v.p, rows[i]);
      }
    }
  return whole;
}

template <bool IN, class S>
static FRS_INLINE int64_t squares(const View& v, const Part& part, S* panel) {
  if constexpr (std::is_same_v<S, float>) {
    if (part.tile->level->interleaved && v.c == 1 && v.p >= 0 && part.channels >= WIDTH) switch (v.dtype) {
        case DType::f32: return each_square<IN, float>(v, part, panel);
        case DType::bf16: return each_square<IN, Bf16>(v, part, panel);
        case DType::f16: return each_square<IN, F16>(v, part, panel);
        default: break;
      }
  }
  return 0;
}

// Into a panel of COLUMN positions; those behind the last are 0. `line` has room for the channels of one.
template <class S>
static void gather(const View& v, const Part& part, S* panel, S* line) {
  const bool interleaved = part.tile->level->interleaved;
  if (part.positions < COLUMN) memset(panel, 0, part.channels * COLUMN * sizeof(S));
  const int64_t done = squares<true>(v, part, panel);
  panel += done;
  each_line(v, part.from(done), [&](int64_t at, int64_t step, int64_t c, int64_t p, int64_t count) {
    const char* from = address(v, at);
    S* to = interleaved ? line : panel + c * COLUMN + p;
    if (step == 1)
      widen_run(to, from, v.dtype, count);
    else
      for (int64_t i = 0; i < count; ++i) to[i] = item<S>(from, v.dtype, i * step);
    if (interleaved)
      for (int64_t i = 0; i < count; ++i) panel[i * COLUMN + p] = line[i];
  });
}

// And back.
template <class S>
static void scatter(const View& v, const Part& part, S* panel, S* line) {
  const bool interleaved = part.tile->level->interleaved;
  const int64_t done = squares<false>(v, part, panel);
  panel += done;
  each_line(v, part.from(done), [&](int64_t at, int64_t step, int64_t c, int64_t p, int64_t count) {
    char* to = const_cast<char*>(address(v, at));
    const S* from = interleaved ? line : panel + c * COLUMN + p;
    if (interleaved)
      for (int64_t i = 0; i < count; ++i) line[i] = panel[i * COLUMN + p];
    if (step == 1)
      narrow_run(to, v.dtype, from, count);
    else
      for (int64_t i = 0; i < count; ++i) put(to, v.dtype, i * step, from[i]);
  });
}

}  // namespace frs::FRS_ISA
