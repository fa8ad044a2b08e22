// How a block of `imitate` goes over its tile: the loads of several packets of x and z are under way before the first
// is used, and before the shares of the tile are made.
//
//     lines     planar, long lines: a warp takes 32 packets of one channel, the next channels the other warps. A thread
//               keeps to its positions, whose shares stay in its registers.
//     run       planar, an image as one flat run of numbers: coarse levels, odd lines, few channels. Shares in shared
//               memory, by position.
//     positions interleaved: all channels of some positions. Shares in shared memory, one a line.
//     numbers   anything: one number at a time.
#pragma once

#include "levels.cuh"

namespace frs::cuda {

constexpr uint32_t MAX_SHARES = 2048;  // of a tile in shared memory: 8 KB, 16 in fp64
constexpr int PACKETS = 2;             // of x and of z that a thread keeps under way

enum class Walk : uint8_t { lines, run, positions, numbers };

// An entry as a kernel needs it.
struct ImitateRow {
  Operand student, teacher, grad;
  int64_t first;
  double scale, eps;
  uint32_t channels, positions;
  uint32_t width;                  // to split positions by, or 0
  uint32_t lines, columns;         // of a tile, in numbers; a run has one line
  uint32_t line_tiles, col_tiles;  // of an image
  uint32_t divider;                // to divide by the packets of a line, or by the positions
  uint16_t entry, level, term;
  bool interleaved;
  Walk walk;
};

struct Tile {
  uint32_t n, line, column, lines, columns;  // where it begins, and what of it lies in the level
};

__device__ __forceinline__ Tile tile_of(const ImitateRow& row, uint32_t tile) {
  // Planar, the channels of some positions are neighbours: in the order in which `score` has read them.
  const bool i = row.interleaved, run = row.walk == Walk::run;
  const uint32_t inner = i ? row.col_tiles : row.line_tiles, outer = i ? row.line_tiles : row.col_tiles;
  const uint32_t a = tile % inner, b = tile / inner % outer;
  const uint32_t line = (i ? b : a) * row.lines, column = (i ? a : b) * row.columns;
  const uint32_t lines = run ? 1 : i ? row.positions : row.channels;
  const uint32_t columns = run ? row.channels * row.positions : i ? row.channels : row.positions;
  return {tile / inner / outer, line, column, min(row.lines, lines - line), min(row.columns, columns - column)};
}

// What a block works with beside its tile.
template <class A>
struct Coefficients {
  A upstream;  // of the slopes: weight * factor * temperature
  A inverse_temperature, beta;
};

// How one loss is computed in one pair of dtypes: V numbers in a packet. TEMPERED: logits are divided; CHECK_GRAD: an
// entry may want none.
template <class S_, class T_, class A_, int V_, Loss LOSS_, bool TEMPERED_, bool WANT_LOSS_, bool WANT_GRAD_,
          bool CHECK_GRAD_>
struct Work {
  using S = S_;
  using T = T_;
  using A = A_;
  static constexpr int V = V_;
  static constexpr Loss LOSS = LOSS_;
  static constexpr bool TEMPERED = TEMPERED_ && Traits<LOSS>::takes_logits;
  static constexpr bool WANT_LOSS = WANT_LOSS_, WANT_GRAD = WANT_GRAD_, CHECK_GRAD = CHECK_GRAD_;

  static __device__ __forceinline__ bool wants_grad(const ImitateRow& row) {
    return WANT_GRAD && (!CHECK_GRAD || row.grad.data);
  }
};

// What makes a share of a score: scale * S / (norm + eps), 0 where the denominator is 0.
struct Share {
  const void* scores;
  const void* norm;
  DType dtype;
  uint32_t joint;  // how many levels' norms are added up for every entry, or 0

  template <class N>
  __device__ __forceinline__ N norm_of(const ImitateRow& row) const {
    const N* norms = static_cast<const N*>(norm);
    if (joint == 0) return norms[row.level];
    N sum = norms[0];
#pragma unroll 1  // rare: it takes 140 instructions of every kernel otherwise
    for (uint32_t l = 1; l < joint; ++l) sum += norms[l];
    return sum;
  }
  template <class N>
  __device__ __forceinline__ N of(const ImitateRow& row, int64_t at) const {
    const N score = static_cast<const N*>(scores)[at];  // on its way beside the norm
    const N denominator = norm_of<N>(row) + static_cast<N>(row.eps);
    const N share = score / denominator;
    return denominator == 0 ? 0 : share;
  }
  template <class A>
  __device__ __forceinline__ A at(const ImitateRow& row, int64_t at) const {
    const A share = dtype == DType::f64 ? static_cast<A>(of<double>(row, at)) : static_cast<A>(of<float>(row, at));
    return share * static_cast<A>(row.scale);
  }
};

template <class W, int V>
struct Pair {
  Held<typename W::S, typename W::A, V> x;
  Held<typename W::T, typename W::A, V> z;

  __device__ __forceinline__ void fetch(const ImitateRow& row, const char* from_x, const char* from_z) {
    x.template fetch<Use::once>(from_x, 0, row.student.dtype);
    z.template fetch<Use::once>(from_z, 0, row.teacher.dtype);
  }

  // The gradient of V numbers, stored; the sum of share * value.
  __device__ __forceinline__ typename W::A work(const ImitateRow& row, const typename W::A (&share)[V],
                                                const Coefficients<typename W::A>& with, char* grad) const {
    using A = typename W::A;
    A xs[V], zs[V], sum = 0, out[V];
    x.widen_to(xs), z.widen_to(zs);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if constexpr (W::TEMPERED) xs[i] *= with.inverse_temperature, zs[i] *= with.inverse_temperature;
      const auto [value, slope] = Traits<W::LOSS>::at(xs[i], zs[i], with.beta);
      if constexpr (W::WANT_LOSS) sum += share[i] * value;
      out[i] = with.upstream * share[i] * slope;
    }
    if (W::wants_grad(row)) put<typename W::S, A, V>(grad, 0, row.grad.dtype, out);
    return sum;
  }
};

// `shares` is the block's: MAX_SHARES and a packet more.
template <class W>
__device__ __forceinline__ typename W::A walk_lines(const ImitateRow& row, const Tile& tile, const Share& share_of,
                                                    const Coefficients<typename W::A>& with, typename W::A* shares) {
  using A = typename W::A;
  using S = typename W::S;
  using T = typename W::T;
  constexpr int V = W::V, U = PACKETS;
  const uint32_t warp = threadIdx.x / WARP, column = threadIdx.x % WARP * V;
  const bool inside = column < tile.columns;
  const uint32_t p = tile.column + column, line = tile.line + warp;
  const char* x = address<S>(row.student, tile.n * row.student.n + line * row.student.c + p);
  const char* z = address<T>(row.teacher, tile.n * row.teacher.n + line * row.teacher.c + p);
  char* g = address<S>(row.grad, tile.n * row.grad.n + line * row.grad.c + p);
  const auto step_of = [](int64_t line, int64_t bytes) { return static_cast<uint32_t>(line * bytes) * WARPS; };
  const uint64_t x_step = step_of(row.student.c, sizeof(S)), z_step = step_of(row.teacher.c, sizeof(T)),
                 g_step = step_of(row.grad.c, sizeof(S));
  Pair<W, V> pairs[U];
  const auto fetch = [&](uint32_t at) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (at + u * WARPS < tile.lines) pairs[u].fetch(row, x + u * x_step, z + u * z_step);
  };
  if (inside) fetch(warp);
  wait_for_previous();
  const int64_t first = row.first + static_cast<int64_t>(tile.n) * row.positions + tile.column;
  for (uint32_t i = threadIdx.x; i < tile.columns; i += THREADS) shares[i] = share_of.at<A>(row, first + i);
  __syncthreads();
  if (!inside) return 0;
  A share[V], sum = 0;
  memcpy(share, __builtin_assume_aligned(shares + column, sizeof(share) < 16 ? sizeof(share) : 16), sizeof(share));
  for (uint32_t at = warp; at < tile.lines; at += U * WARPS) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (at + u * WARPS < tile.lines) sum += pairs[u].work(row, share, with, g + u * g_step);
    x += U * x_step, z += U * z_step, g += U * g_step;
    fetch(at + U * WARPS);
  }
  return sum;
}

// A run of an image's numbers, or all channels of some positions.
template <class W, bool RUN>
__device__ __forceinline__ typename W::A walk_flat(const ImitateRow& row, const Tile& tile, const Share& share_of,
                                                   const Coefficients<typename W::A>& with, typename W::A* shares) {
  using A = typename W::A;
  using S = typename W::S;
  using T = typename W::T;
  constexpr int V = W::V, U = PACKETS;
  const uint32_t in_line = (RUN ? tile.columns : row.columns) / V, end = tile.lines * in_line;
  const auto corner = [&](const Operand& o) { return tile.n * o.n + tile.column + (RUN ? 0 : tile.line * o.w); };
  const char* const x = address<S>(row.student, corner(row.student));
  const char* const z = address<T>(row.teacher, corner(row.teacher));
  char* const g = address<S>(row.grad, corner(row.grad));
  struct Spot {  // of a packet
    uint32_t line, column;
  };
  const auto spot_of = [&](uint32_t i) -> Spot {
    if (RUN) return {0, i * V};
    const uint32_t line = divide(i, row.divider);
    return {line, (i - line * in_line) * V};
  };
  const auto is_inside = [&](uint32_t i, const Spot& spot) { return i < end && (RUN || spot.column < tile.columns); };
  const auto offset = [](const Operand& o, const Spot& spot, uint32_t bytes) {
    return (static_cast<uint64_t>(spot.line) * static_cast<uint32_t>(RUN ? 0 : o.w) + spot.column) * bytes;
  };
  Pair<W, V> pairs[U];
  const auto fetch = [&](uint32_t first) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Spot spot = spot_of(first + u * THREADS);
      if (is_inside(first + u * THREADS, spot))
        pairs[u].fetch(row, x + offset(row.student, spot, sizeof(S)), z + offset(row.teacher, spot, sizeof(T)));
    }
  };
  fetch(threadIdx.x);
  wait_for_previous();
  const int64_t image = row.first + static_cast<int64_t>(tile.n) * row.positions;
  if (RUN) {
    // From the position of the first number on, as many as the tile has or the image, and those of a packet more.
    const uint32_t count = min(tile.columns, row.positions) + V - 1, p0 = tile.column % row.positions;
    for (uint32_t i = threadIdx.x; i < count; i += THREADS)
      shares[i] = share_of.at<A>(row, image + (p0 + i) % row.positions);
  } else {
    for (uint32_t i = threadIdx.x; i < tile.lines; i += THREADS) shares[i] = share_of.at<A>(row, image + tile.line + i);
  }
  __syncthreads();
  A sum = 0;
  for (uint32_t first = threadIdx.x; first < end; first += U * THREADS) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Spot spot = spot_of(first + u * THREADS);
      if (!is_inside(first + u * THREADS, spot)) continue;
      const uint32_t at = RUN ? spot.column - divide(spot.column, row.divider) * row.positions : spot.line;
      A share[V];
#pragma unroll
      for (int i = 0; i < V; ++i) share[i] = shares[RUN ? at + i : at];
      sum += pairs[u].work(row, share, with, g + offset(row.grad, spot, sizeof(S)));
    }
    fetch(first + U * THREADS);
  }
  return sum;
}

// Any strides and any dtypes, one number at a time.
template <class W>
__device__ __forceinline__ typename W::A walk_numbers(const ImitateRow& row, const Tile& tile, const Share& share_of,
                                                      const Coefficients<typename W::A>& with, typename W::A* shares) {
  using A = typename W::A;
  using S = typename W::S;
  using T = typename W::T;
  constexpr int U = 4;
  const uint32_t p0 = row.interleaved ? tile.line : tile.column;
  const uint32_t count = row.interleaved ? tile.lines : tile.columns;
  const uint32_t end = tile.lines * row.columns;
  struct Spot {
    uint32_t channel, position;
    bool inside;
  };
  const auto spot_of = [&](uint32_t i) -> Spot {
    const uint32_t line = divide(i, row.divider), column = i - line * row.columns;
    const bool inside = i < end && column < tile.columns;
    const uint32_t l = tile.line + line, c = tile.column + column;
    return row.interleaved ? Spot{c, l, inside} : Spot{l, c, inside};
  };
  const auto at = [&](const Operand& o, const Spot& spot) {
    return tile.n * o.n + spot.channel * o.c + position_offset(o, spot.position, row.width);
  };
  Pair<W, 1> pairs[U];
  const auto fetch = [&](uint32_t first) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Spot spot = spot_of(first + u * THREADS);
      if (spot.inside)
        pairs[u].fetch(row, address<S>(row.student, at(row.student, spot)),
                       address<T>(row.teacher, at(row.teacher, spot)));
    }
  };
  fetch(threadIdx.x);
  wait_for_previous();
  const int64_t image = row.first + static_cast<int64_t>(tile.n) * row.positions;
  for (uint32_t i = threadIdx.x; i < count; i += THREADS) shares[i] = share_of.at<A>(row, image + p0 + i);
  __syncthreads();
  A sum = 0;
  for (uint32_t first = threadIdx.x; first < end; first += U * THREADS) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Spot spot = spot_of(first + u * THREADS);
      if (!spot.inside) continue;
      const A share[1] = {shares[spot.position - p0]};
      sum += pairs[u].work(row, share, with, address<S>(row.grad, at(row.grad, spot)));
    }
    fetch(first + U * THREADS);
  }
  return sum;
}

}  // namespace frs::cuda
