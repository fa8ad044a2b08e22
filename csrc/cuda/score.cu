// score: S_p = max_k sigmoid(z_pk) = sigmoid(max_k z_pk), and each level's mass M_l = sum_p S_p.
//
// A block takes some positions and all their K logits: its threads are `units` of positions times `lanes` along K. Each
// thread keeps the maximum of its share of K; the lanes meet by shuffles and, of several warps, in shared memory. A NaN
// comes through the maximum. 16-bit logits are compared two at once, as they are.
//
//     planar          a unit is V positions, a lane takes every lanes-th channel
//     interleaved     a unit is one position, a lane takes every lanes-th V channels
//
// Where one lane takes all of K (an RPN's objectness), a block takes several units of positions a thread.
#include <cmath>

#include "slots.cuh"
#include "verbs.cuh"

namespace frs {
namespace cuda {
namespace {

constexpr uint32_t FEW = 4;  // channels that one thread takes

struct ScoreRow {
  Operand logits;
  int64_t first;
  uint32_t channels, positions;
  uint32_t width;      // to split positions by, or 0
  uint32_t tiles;      // blocks an image
  uint32_t rounds;     // units that a thread takes, where it takes all channels
  uint32_t log_lanes;  // THREADS = units * lanes
  bool interleaved, wide, by_five;
};
using ScoreTable = Table<ScoreRow>;

struct ScoreOutput {
  void* scores;
  void* mass;
  Workspace workspace;
};
static_assert(sizeof(ScoreTable) + sizeof(ScoreOutput) <= PARAMETER_BYTES);

// The maxima over the channels lane, lane + lanes, ... of the packet at `data`; `step` bytes lie between two of them.
template <class T, class A, int V, int UNROLL>
__device__ __forceinline__ Top<T, A, V> lane_maxima(const char* data, int64_t step, uint32_t k, uint32_t lanes,
                                                    uint32_t length, DType dtype) {
  Top<T, A, V> top;
  Held<T, A, V> z[UNROLL];
  for (; k + (UNROLL - 1) * lanes < length; k += UNROLL * lanes, data += UNROLL * step) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) z[u].template fetch<Use::again>(data + u * step, 0, dtype);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) top.take(z[u]);
  }
  if (k < length) {
#pragma unroll
    for (int u = 0; u < UNROLL - 1; ++u)  // the first again where there are no more: the maximum does not mind
      z[u].template fetch<Use::again>(data + (k + u * lanes < length ? u * step : 0), 0, dtype);
#pragma unroll
    for (int u = 0; u < UNROLL - 1; ++u) top.take(z[u]);
  }
  return top;
}

// The sigmoids of `count` maxima, stored; their sum.
template <class A>
__device__ __forceinline__ double store_scores(A* scores, const A* maxima, uint32_t count) {
  double sum = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const A score = sigmoid(maxima[i]);
    scores[i] = score;
    sum += score;
  }
  return sum;
}

// Positions by the unit, channels shared out among lanes.
template <class T, class A, int V>
__device__ __forceinline__ double score_tile(const ScoreRow& row, const ScoreOutput& output, uint32_t tile) {
  constexpr int UNROLL = V == 1 ? 16 : 8;
  __shared__ A maxima[WARPS][WARP * V];
  const uint32_t lanes = 1u << row.log_lanes, units = THREADS >> row.log_lanes;
  const bool interleaved = row.interleaved;
  const uint32_t unit = interleaved ? threadIdx.x >> row.log_lanes : threadIdx.x % units;
  const uint32_t lane = interleaved ? threadIdx.x % lanes : threadIdx.x / units;
  const uint32_t per_unit = interleaved ? 1 : V, per_step = interleaved ? V : 1;
  const uint32_t n = tile / row.tiles, p0 = tile % row.tiles * units * per_unit;
  const uint32_t p = p0 + unit * per_unit, length = row.channels / per_step;
  const int64_t bytes = bytes_of(row.logits.dtype), step = per_step * row.logits.c * bytes;
  Top<T, A, V> top;
  if (p < row.positions) {
    const char* data = static_cast<const char*>(row.logits.data) + lane * step +
                       (n * row.logits.n + position_offset(row.logits, p, row.width)) * bytes;
    const int64_t stride = V > 1 ? static_cast<int64_t>(static_cast<uint32_t>(lanes * step)) : lanes * step;
    if (V > 1 && row.by_five)
      top = lane_maxima<T, A, V, 5>(data, stride, lane, lanes, length, row.logits.dtype);
    else
      top = lane_maxima<T, A, V, UNROLL>(data, stride, lane, lanes, length, row.logits.dtype);
  }
  A* scores = static_cast<A*>(output.scores) + row.first + static_cast<int64_t>(n) * row.positions;
  A best[V];
  if (interleaved) {  // the lanes of a position are neighbours in a warp
    for (uint32_t offset = lanes / 2; offset; offset /= 2) top.meet(offset);
    top.widen_to(best);
#pragma unroll
    for (int i = 1; i < V; ++i) best[0] = larger(best[0], best[i]);
    return lane == 0 && p < row.positions ? store_scores(scores + p, best, 1) : 0;
  }
  // In a warp the lanes of a unit are `units` threads apart; where there are more units than threads, it has one lane.
  for (uint32_t offset = WARP / 2; offset >= units; offset /= 2) top.meet(offset);
  const uint32_t in_warp = min(units, WARP), warp = threadIdx.x / WARP;
  top.widen_to(best);
  if (threadIdx.x % WARP < in_warp) {
#pragma unroll
    for (int i = 0; i < V; ++i) maxima[warp][threadIdx.x % WARP * V + i] = best[i];
  }
  __syncthreads();
  // A warp's units are those of every (units / WARP)-th warp, or of all.
  const uint32_t apart = max(units / WARP, 1u);
  double sum = 0;
  for (uint32_t i = threadIdx.x; i < units * V && p0 + i < row.positions; i += THREADS) {
    const uint32_t of = i / V / WARP, at = i - of * WARP * V;
    A most = maxima[of][at];
    for (uint32_t w = of + apart; w < WARPS; w += apart) most = larger(most, maxima[w][at]);
    sum += store_scores(scores + p0 + i, &most, 1);
  }
  return sum;
}

// Few channels: a thread takes all of a unit, and several units, two under way at once.
template <class T, class A, int V>
__device__ __forceinline__ double score_few(const ScoreRow& row, const ScoreOutput& output, uint32_t tile) {
  const uint32_t n = tile / row.tiles, first = tile % row.tiles * row.rounds * THREADS + threadIdx.x;
  const int64_t bytes = bytes_of(row.logits.dtype), step = row.logits.c * bytes;
  const char* data = static_cast<const char*>(row.logits.data) + n * row.logits.n * bytes;
  A* scores = static_cast<A*>(output.scores) + row.first + static_cast<int64_t>(n) * row.positions;
  double sum = 0;
  for (uint32_t round = 0; round < row.rounds; round += 2) {
    Held<T, A, V> z[2][FEW];
#pragma unroll
    for (uint32_t r = 0; r < 2; ++r) {
      const uint32_t p = (first + (round + r) * THREADS) * V;
      if (p >= row.positions) continue;
      const char* const at = data + position_offset(row.logits, p, row.width) * bytes;
#pragma unroll
      for (uint32_t k = 0; k < FEW; ++k)
        z[r][k].template fetch<Use::again>(at + (k < row.channels ? k * step : 0), 0, row.logits.dtype);
    }
#pragma unroll
    for (uint32_t r = 0; r < 2; ++r) {
      const uint32_t p = (first + (round + r) * THREADS) * V;
      if (p >= row.positions) continue;
      Top<T, A, V> top;
#pragma unroll
      for (uint32_t k = 0; k < FEW; ++k) top.take(z[r][k]);
      A best[V];
      top.widen_to(best);
      sum += store_scores(scores + p, best, V);
    }
  }
  return sum;
}

template <class T, class A, int V>
__global__ void __launch_bounds__(THREADS, sizeof(A) == 4 ? 6 : 5)
    score_kernel(const __grid_constant__ ScoreTable table, const __grid_constant__ ScoreOutput output) {
  let_next_begin();
  const uint32_t index = find_row(table, blockIdx.x);
  double sum = 0;
  if (index < table.count) {
    const ScoreRow& row = table.rows[index];
    const uint32_t tile = blockIdx.x - table.starts[index];
    if (row.rounds)
      sum = V > 1 && row.wide ? score_few<T, A, V>(row, output, tile) : score_few<T, A, 1>(row, output, tile);
    else
      sum = V > 1 && row.wide ? score_tile<T, A, V>(row, output, tile) : score_tile<T, A, 1>(row, output, tile);
  }
  if (!store_partial(output.workspace, blockIdx.x, sum)) return;
  sum_rows(output.workspace, table, [&](uint32_t i, double s) { static_cast<A*>(output.mass)[i] = static_cast<A>(s); });
}

using Kernel = void (*)(ScoreTable, ScoreOutput);

// One dtype for all levels has a kernel of its own; levels that mix take loads of any dtype, one number at a time.
Kernel kernel_of(const Score& call, int& width) {
  const Level* const end = call.levels + call.count;
  const DType dtype = call.count ? call.levels->teacher.dtype : DType::f32;
  const bool same = std::all_of(call.levels, end, [=](const Level& level) { return level.teacher.dtype == dtype; });
  width = 1;
  if (!same || (call.dtype == DType::f64) != (dtype == DType::f64))
    return call.dtype == DType::f64 ? score_kernel<Any, double, 1> : score_kernel<Any, float, 1>;
  width = static_cast<int>(16 / bytes_of(dtype));
  switch (dtype) {
    case DType::f64: return score_kernel<double, double, 2>;
    case DType::f32: return score_kernel<float, float, 4>;
    case DType::bf16: return score_kernel<bf16, float, 8>;
    default: return score_kernel<f16, float, 8>;
  }
}

// How a level is shared out. Lanes: as many as leave a thread some five or eight loads, at most 16, of a planar level
// 8: with 720 classes 16 took 7 to 8 % longer on an H200. Twice as many as long as the whole launch has fewer than two
// blocks a multiprocessor.
struct Shares {
  uint32_t log_lanes, tiles, rounds;
  bool wide, by_five;
};

Shares shares_of(const Level& level, int widest, uint32_t at_least_lanes) {
  const bool wide = widest > 1 && !is_empty(level) && is_wide(level, level.teacher, widest);
  const int64_t width = wide ? widest : 1, positions = level.positions();
  if (level.c <= FEW && (!level.interleaved || !wide)) {
    const int64_t units = cdiv(positions, width), blocks = cdiv(units * level.n, THREADS);
    const auto rounds = static_cast<uint32_t>(std::clamp<int64_t>(blocks / BLOCKS, 1, 4) * 2);
    return {0, cdiv(units, rounds * THREADS), rounds, wide, false};
  }
  const int64_t length = level.interleaved ? level.c / width : level.c;
  const uint32_t most = std::min(WARP, THREADS);
  uint32_t lanes = 1;
  const auto more = [&] {
    if (lanes >= most) return false;
    if (lanes < at_least_lanes) return lanes < length;
    return level.interleaved ? lanes < 16 && lanes * 5 < length : lanes < 8 && lanes * 10 < length;
  };
  while (more()) lanes *= 2;
  uint32_t log = 0;
  while ((1u << log) < lanes) ++log;
  const int64_t loads = (length + lanes - 1) / lanes;
  const bool by_five = loads <= 10 && (loads + 4) / 5 * 5 < (loads + 7) / 8 * 8;
  const uint32_t size = (THREADS >> log) * (level.interleaved ? 1 : static_cast<uint32_t>(width));
  return {log, cdiv(positions, size), 0, wide, by_five};
}

int64_t blocks_of(const Level* levels, int64_t count, int widest, uint32_t lanes) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i)
    blocks += is_empty(levels[i]) ? 0 : levels[i].n * shares_of(levels[i], widest, lanes).tiles;
  return blocks;
}

// Fills the table, if there is one, for kernels that move `widest` numbers at once; returns the number of blocks.
int64_t plan(const Level* levels, int64_t count, int widest, ScoreTable* table) {
  uint32_t lanes = 1;  // 32 of them cost more instructions than the blocks they make are worth (a simulator: 3 times)
  while (lanes < WARP / 2 && blocks_of(levels, count, widest, lanes) < cdiv(BLOCKS, 8)) lanes *= 2;
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Level& level = levels[i];
    check_sizes(level, "score");
    const Shares shares = shares_of(level, widest, lanes);
    if (table) {
      table->starts[i] = static_cast<uint32_t>(blocks);
      const bool split = !has_positions(level.teacher);
      table->rows[i] = {operand_of(level.teacher, !split),
                        level.first,
                        static_cast<uint32_t>(level.c),
                        static_cast<uint32_t>(level.positions()),
                        split ? static_cast<uint32_t>(level.w) : 0,
                        shares.tiles,
                        shares.rounds,
                        shares.log_lanes,
                        level.interleaved,
                        shares.wide,
                        shares.by_five};
    }
    blocks += is_empty(level) ? 0 : level.n * shares.tiles;
  }
  if (table) {
    table->starts[count] = static_cast<uint32_t>(blocks);
    table->count = static_cast<uint32_t>(count);
  }
  return std::max<int64_t>(blocks, 1);  // levels without any position still have a mass, 0
}

// Levels in groups of MAX_ROWS, one launch each.
template <class F>
void each_group(int64_t count, const F& f) {
  for (int64_t first = 0; first < count; first += MAX_ROWS) f(first, std::min<int64_t>(count - first, MAX_ROWS));
}

}  // namespace

int64_t score_blocks(const Score& call) {
  int width;
  kernel_of(call, width);
  int64_t blocks = 1;
  each_group(call.count, [&](int64_t first, int64_t count) {
    blocks = std::max(blocks, plan(call.levels + first, count, width, nullptr));
  });
  return blocks;
}

void launch_score(const Score& call, const Workspace& workspace, void* stream) {
  int width;
  const Kernel kernel = kernel_of(call, width);
  const int64_t bytes = bytes_of(call.dtype);
  each_group(call.count, [&](int64_t first, int64_t count) {
    ScoreTable table{};
    const int64_t blocks = plan(call.levels + first, count, width, &table);
    launch("score", kernel, blocks, stream, Begin::after_previous, table,
           ScoreOutput{call.scores, static_cast<char*>(call.mass) + first * bytes, workspace});
  });
}

}  // namespace cuda

int64_t score_workspace(const Score& call) { return cuda::workspace_bytes(cuda::score_blocks(call), 0); }

void score(const Score& call, void* memory, void* stream) {
  cuda::reset(memory, 0, "score", stream);
  cuda::launch_score(call, cuda::workspace_at(memory, 0), stream);
}

}  // namespace frs
