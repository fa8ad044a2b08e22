// What a thread adds up of parts of rows, and how the threads of a part agree on its sums (row_losses.h).
//
// In float a thread adds up at most some tens of numbers, about pivots of their own: a part's first numbers, or the
// maxima so far. From there on in double, once a thread and not once a number: the rate is 1/64 on many devices.
#pragma once

#include "row_walks.cuh"
#include "slots.cuh"

namespace frs::cuda {

constexpr double LOG2_E = 1.44269504088896340736, LN_2 = 0.693147180559945309417;

template <RowLoss LOSS, class A>
struct Part {
  static constexpr int FIRST = LOSS == RowLoss::cwd ? 2 : 0;  // the sums before are the pivots, which are maxima
  A pivot_s, pivot_t;
  A at[NUMBERS];

  __device__ __forceinline__ Part() : at{} {
    if constexpr (LOSS == RowLoss::cwd) pivot_s = pivot_t = -INFINITY;
  }

  // pace: log2(e) / temperature, the unit of the differences in the last sum, too
  __device__ __forceinline__ void take(A s, A t, [[maybe_unused]] A pace) {
    if constexpr (LOSS == RowLoss::pkd) {
      const A d = s - pivot_s, e = t - pivot_t;
      at[0] += d, at[1] += e, at[2] += d * d, at[3] += e * e, at[4] += d * e;
    } else {
      const A d = (s - pivot_s) * pace, e = (t - pivot_t) * pace, q = Primitives<A>::power_of_two(e);
      at[2] += Primitives<A>::power_of_two(d), at[3] += q, at[4] += q * (e - d);
    }
  }

  // cwd: the sums about maxima that are no smaller. Of a thread without numbers (MAY_BE_EMPTY) the maxima are minus
  // infinity, from which no difference may be taken where those of all are.
  template <bool MAY_BE_EMPTY = false>
  __device__ __forceinline__ void raise(A s, A t, A pace) {
    const A d = (pivot_s - s) * pace, e = (pivot_t - t) * pace;
    A by_s = Primitives<A>::power_of_two(d), by_t = Primitives<A>::power_of_two(e);
    if (MAY_BE_EMPTY && s == pivot_s) by_s = 1;
    if (MAY_BE_EMPTY && t == pivot_t) by_t = 1;
    if (at[3] != 0) at[4] += at[3] * (e - d);
    pivot_s = s, pivot_t = t, at[2] *= by_s, at[3] *= by_t, at[4] *= by_t;
  }
};

// Adds packets up: each in one part, or its numbers in one each.
template <RowLoss LOSS, class A, int PARTS, class B, int U>
__device__ __forceinline__ void take(Part<LOSS, A> (&parts)[PARTS], const B (&both)[U], uint32_t taken, A pace) {
  constexpr int V = B::V;
  A s[V], t[V];
  if constexpr (LOSS == RowLoss::cwd) {
    Top<typename B::S, A, V> top_s;
    Top<typename B::T, A, V> top_t;
#pragma unroll
    for (uint32_t u = 0; u < U; ++u)
      if (u == 0 || u < taken) top_s.take(both[u].s), top_t.take(both[u].t);
    top_s.widen_to(s), top_t.widen_to(t);
#pragma unroll
    for (int i = PARTS; i < V; ++i)
      s[i % PARTS] = larger(s[i % PARTS], s[i]), t[i % PARTS] = larger(t[i % PARTS], t[i]);
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
      parts[i].raise(larger(parts[i].pivot_s, s[i]), larger(parts[i].pivot_t, t[i]), pace);
  }
#pragma unroll
  for (uint32_t u = 0; u < U; ++u) {
    if (u > 0 && u >= taken) continue;
    both[u].s.widen_to(s), both[u].t.widen_to(t);
#pragma unroll
    for (int i = 0; i < V; ++i) parts[i % PARTS].take(s[i], t[i], pace);
  }
}

// The sums of a part, about the pivots that the row's other parts have, or with its maxima.
template <RowLoss LOSS, class A>
__device__ __forceinline__ Sums settled(Sums sums, A pivot_s, A pivot_t, double row_s, double row_t, double count) {
  if constexpr (LOSS == RowLoss::pkd) return RowTraits<LOSS>::moved(sums, count, pivot_s - row_s, pivot_t - row_t);
  sums.at[0] = pivot_s, sums.at[1] = pivot_t, sums.at[4] *= LN_2;
  return sums;
}

// The numbers at a position of a spot's channels.
template <class S, class T, class A, int V>
struct Pivots {
  A s[V], t[V];

  __device__ __forceinline__ Pivots(const RowLevel& level, const Spot& at, uint32_t p) {
    Held<S, A, V> of_s;
    Held<T, A, V> of_t;
    Line<S, V>(level.student, at, level.width).template fetch<Use::again>(of_s, p);
    Line<T, V>(level.teacher, at, level.width).template fetch<Use::again>(of_t, p);
    of_s.widen_to(s), of_t.widen_to(t);
  }
};

// Those that a row's parts are moved to: the first of the first image.
template <class S, class T, class A>
__device__ __forceinline__ Pivots<S, T, A, 1> pivots_of_row(const RowLevel& level, Spot at) {
  at.n = 0;
  return {level, at, 0};
}

template <class A>
__device__ __forceinline__ A lanes_maximum(A value, uint32_t lanes) {
  for (uint32_t offset = lanes / 2; offset; offset /= 2)
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;  // in all of them
}
// The sums of this thread's run, in the run's first thread.
template <class S, class T, class A, int V, RowLoss LOSS>
__device__ __forceinline__ void sum_run(const RowLevel& level, const Place& place, A pace, Sums* parts) {
  const Spot at = spot_of<S, V, RowTraits<LOSS>::per_image, false>(level, place);
  Part<LOSS, A> part[1];
  A row_s = 0, row_t = 0;
  if (at.inside) {
    if constexpr (LOSS == RowLoss::pkd) {
      const Pivots<S, T, A, 1> own(level, at, at.begin), row = pivots_of_row<S, T, A>(level, at);
      part[0].pivot_s = own.s[0], part[0].pivot_t = own.t[0], row_s = row.s[0], row_t = row.t[0];
    }
    constexpr uint32_t U = sizeof(A) == 8 ? UNDER_WAY / 2 : UNDER_WAY;
    walk<Both<S, T, A, V>, U, false>(
        level, at, [&](const auto& both, uint32_t taken, uint32_t, uint32_t) { take(part, both, taken, pace); });
  }
  const uint32_t lanes = 1u << level.log_lanes;
  if constexpr (LOSS == RowLoss::cwd)
    part[0].template raise<true>(lanes_maximum(part[0].pivot_s, lanes), lanes_maximum(part[0].pivot_t, lanes), pace);
  Sums sums;
#pragma unroll
  for (int k = part[0].FIRST; k < NUMBERS; ++k) sums.at[k] = part[0].at[k];
  for (uint32_t offset = lanes / 2; offset; offset /= 2) {
#pragma unroll
    for (int k = part[0].FIRST; k < NUMBERS; ++k) sums.at[k] += __shfl_down_sync(0xffffffffu, sums.at[k], offset);
  }
  if (!at.inside || at.thread != 0) return;
  parts[static_cast<int64_t>(at.row) * level.parts + at.part] =
      settled<LOSS>(sums, part[0].pivot_s, part[0].pivot_t, row_s, row_t, at.end - at.begin);
}

// Where the threads of a tile meet: NUMBERS of each thread and channel, then their sums.
template <class A, int V>
struct Meeting {
  alignas(16) A at[NUMBERS][THREADS * V];
  double sums[NUMBERS][MOST_COLUMNS];

  template <int COUNT, class F>
  __device__ __forceinline__ void put(int k, uint32_t to, const F& of) {
    constexpr int PACKET = COUNT * sizeof(A);
    A numbers[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) numbers[i] = of(i);
    void* const place = at[k] + to;
    memcpy(__builtin_assume_aligned(place, PACKET < 16 ? PACKET : 16), numbers, sizeof(numbers));
  }
};

// The sums of this block's tile, a part a channel.
template <class S, class T, class A, int V, RowLoss LOSS, class M>
__device__ __forceinline__ void sum_tile(const RowLevel& level, const Place& place, A pace, Sums* parts, M& meeting) {
  constexpr int FIRST = Part<LOSS, A>::FIRST;
  const RowRange rows = rows_of(level, place.group);
  const Spot at = spot_of<S, V, RowTraits<LOSS>::per_image, true>(level, place);
  const uint32_t columns = level.rows, column = threadIdx.x % level.across * V, to = at.thread * columns + column;
  Part<LOSS, A> part[V];
  if (at.inside) {
    if constexpr (LOSS == RowLoss::pkd) {
      const Pivots<S, T, A, V> pivots(level, at, at.begin);
#pragma unroll
      for (int i = 0; i < V; ++i) part[i].pivot_s = pivots.s[i], part[i].pivot_t = pivots.t[i];
    }
    // Of pkd a thread has 56 sums and pivots of 8 channels; cwd has exponentials the more, the fewer are under way.
    constexpr bool HALF = sizeof(A) == 8 || (LOSS == RowLoss::pkd && V > 4);
    walk<Both<S, T, A, V>, HALF ? UNDER_WAY / 2 : UNDER_WAY, true>(
        level, at, [&](const auto& both, uint32_t taken, uint32_t, uint32_t) { take(part, both, taken, pace); });
  }
  const uint32_t thread = threadIdx.x;
  if constexpr (LOSS == RowLoss::cwd) {
    if (at.inside) {
      meeting.template put<V>(0, to, [&](int i) { return part[i].pivot_s; });
      meeting.template put<V>(1, to, [&](int i) { return part[i].pivot_t; });
    }
    __syncthreads();
    for (uint32_t i = thread; i < 2 * rows.count; i += THREADS) {
      const uint32_t k = i >= rows.count, c = i - k * rows.count;
      A most = meeting.at[k][c];
      for (uint32_t d = 1; d < at.threads; ++d) most = larger(most, meeting.at[k][d * columns + c]);
      meeting.at[k][c] = most;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (at.inside) part[i].template raise<true>(meeting.at[0][column + i], meeting.at[1][column + i], pace);
  }
  if (at.inside) {
#pragma unroll
    for (int k = FIRST; k < NUMBERS; ++k) meeting.template put<V>(k, to, [&](int i) { return part[i].at[k]; });
  }
  __syncthreads();
  for (uint32_t i = thread; i < (NUMBERS - FIRST) * rows.count; i += THREADS) {
    const uint32_t k = i / rows.count, c = i - k * rows.count;
    double sum = 0;
    for (uint32_t d = 0; d < at.threads; ++d) sum += meeting.at[FIRST + k][d * columns + c];
    meeting.sums[FIRST + k][c] = sum;
  }
  __syncthreads();
  if (thread >= rows.count || place.block >= level.parts) return;
  Sums sums;
#pragma unroll
  for (int k = FIRST; k < NUMBERS; ++k) sums.at[k] = meeting.sums[k][thread];
  A pivot_s, pivot_t, row_s = 0, row_t = 0;
  if constexpr (LOSS == RowLoss::pkd) {
    Spot channel = at;
    channel.c = rows.first + thread;
    const Pivots<S, T, A, 1> own(level, channel, at.begin), row = pivots_of_row<S, T, A>(level, channel);
    pivot_s = own.s[0], pivot_t = own.t[0], row_s = row.s[0], row_t = row.t[0];
  } else {
    pivot_s = meeting.at[0][thread], pivot_t = meeting.at[1][thread];
  }
  parts[static_cast<int64_t>(rows.first + thread) * level.parts + place.block] =
      settled<LOSS>(sums, pivot_s, pivot_t, row_s, row_t, at.end - at.begin);
}

}  // namespace frs::cuda
