// score: S_p = max_k sigmoid(z_pk) = sigmoid(max_k z_pk), and each level's mass M_l = sum_p S_p.
//
// A block takes a few positions and all their K logits: its threads are `units` of positions times `lanes` along K.
// Each thread keeps the maximum of its share of K, the lanes meet in shared memory. A NaN comes through the maximum.
//
//     planar          a unit is V positions, a lane takes every lanes-th channel       8 units of 16 lanes for K >= 16
//     interleaved     a unit is one position, a lane takes every lanes-th V channels   16 units of 8 lanes
//
// Eight units of 16 bytes are one line of memory. More of them would leave the coarse levels to a few long blocks: with
// 16 lanes, 720 logits are 45 loads a thread, six rounds of 8.
#include <cmath>

#include "slots.cuh"

namespace frs {
namespace cuda {
namespace {

struct ScoreLevel {
  Operand logits;
  int64_t first;
  uint32_t channels, positions;
  uint32_t width;      // to split positions by, or 0
  uint32_t tiles;      // blocks an image
  uint32_t log_lanes;  // THREADS = units * lanes
  bool interleaved, wide;
};
using ScoreTable = Table<ScoreLevel>;

struct ScoreOutput {
  void* scores;
  void* mass;
  Workspace workspace;
};
static_assert(sizeof(ScoreTable) + sizeof(ScoreOutput) <= PARAMETER_BYTES);

template <class A>
__device__ __forceinline__ A larger(A best, A z) {
  return z > best || z != z ? z : best;  // fmax would drop a NaN
}

// The maxima of V positions (planar) or of one (interleaved: then over V channels) to `maxima`.
template <class T, class A, int V>
__device__ __forceinline__ void lane_maxima(const ScoreLevel& level, uint32_t n, uint32_t p0, A* maxima) {
  constexpr int UNROLL = V == 1 ? 16 : 8;  // loads in flight; 8 of 16 bytes are 32 registers
  const uint32_t lanes = 1u << level.log_lanes, units = THREADS >> level.log_lanes;
  const bool interleaved = level.interleaved;
  const uint32_t unit = interleaved ? threadIdx.x >> level.log_lanes : threadIdx.x % units;
  const uint32_t lane = interleaved ? threadIdx.x % lanes : threadIdx.x / units;
  const uint32_t per_unit = interleaved ? 1 : V, per_step = interleaved ? V : 1;
  const uint32_t p = p0 + unit * per_unit;
  const uint32_t length = level.channels / per_step;
  const int64_t step = lanes * per_step * level.logits.c;

  A best[V];
#pragma unroll
  for (int i = 0; i < V; ++i) best[i] = -INFINITY;
  if (p < level.positions) {
    int64_t at = n * level.logits.n + lane * per_step * level.logits.c + position_offset(level.logits, p, level.width);
    for (uint32_t k = lane; k < length; k += UNROLL * lanes) {
      Held<T, A, V> z[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        // The first again where there are no more: the maximum does not mind.
        const bool inside = k + u * lanes < length;
        z[u].template fetch<Use::again>(level.logits.data, at + (inside ? u * step : 0), level.logits.dtype);
      }
      at += UNROLL * step;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const auto packet = z[u].packet();
#pragma unroll
        for (int i = 0; i < V; ++i) best[i] = larger<A>(best[i], widen(packet.at[i]));
      }
    }
  }
  A* to = maxima + (lane * units + unit) * per_unit;
  if (interleaved) {
#pragma unroll
    for (int i = 1; i < V; ++i) best[0] = larger(best[0], best[i]);
    to[0] = best[0];
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = best[i];
  }
}

template <class T, class A, int V>
__global__ void __launch_bounds__(THREADS, sizeof(A) == 4 ? 6 : 5)
    score_kernel(const __grid_constant__ ScoreTable table, const __grid_constant__ ScoreOutput output) {
  __shared__ A maxima[THREADS * V];
  const uint32_t index = find_level(table, blockIdx.x);
  double sum = 0;
  if (index < table.count) {
    const ScoreLevel& level = table.levels[index];
    const uint32_t tile = blockIdx.x - table.starts[index];
    const uint32_t n = tile / level.tiles;
    const uint32_t lanes = 1u << level.log_lanes;
    const uint32_t size = (THREADS >> level.log_lanes) * (level.interleaved || !level.wide ? 1 : V);
    const uint32_t p0 = tile % level.tiles * size;
    if (V > 1 && level.wide)
      lane_maxima<T, A, V>(level, n, p0, maxima);
    else
      lane_maxima<T, A, 1>(level, n, p0, maxima);
    __syncthreads();
    A* scores = static_cast<A*>(output.scores) + level.first + static_cast<int64_t>(n) * level.positions + p0;
    for (uint32_t i = threadIdx.x; i < size && i < level.positions - p0; i += THREADS) {
      A best = maxima[i];
      for (uint32_t lane = 1; lane < lanes; ++lane) best = larger(best, maxima[lane * size + i]);
      const A score = sigmoid(best);
      scores[i] = score;
      sum += score;
    }
  }
  if (!store_partial(output.workspace, blockIdx.x, sum)) return;
  sum_levels(output.workspace, table,
             [&](uint32_t i, double s) { static_cast<A*>(output.mass)[i] = static_cast<A>(s); });
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

uint32_t log_lanes_of(const Level& level, int width) {
  const uint32_t length = level.interleaved ? cdiv(level.c, width) : level.c;
  // Interleaved, 8 lanes of 16 bytes are a line of memory. Of K <= 4, an RPN's objectness, a thread takes all: its
  // neighbours read the same lines.
  const uint32_t planar = width > 1 ? THREADS / 8 : THREADS / 16, interleaved = width > 1 ? 8 : length > 4 ? 32 : 1;
  const uint32_t most = level.interleaved ? interleaved : planar;
  uint32_t log = 0;
  while ((2u << log) <= most && (1u << log) < length) ++log;
  return log;
}

// Fills the table, if there is one, for kernels that move `widest` numbers at once; returns the number of blocks.
int64_t plan(const Level* levels, int64_t count, int widest, ScoreTable* table) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Level& level = levels[i];
    check_sizes(level, "score");
    const bool wide = widest > 1 && !is_empty(level) && is_wide(level, level.teacher, widest);
    const uint32_t log_lanes = log_lanes_of(level, wide ? widest : 1);
    const uint32_t size = (THREADS >> log_lanes) * (wide && !level.interleaved ? widest : 1);
    const uint32_t tiles = cdiv(level.positions(), size);
    if (table) {
      table->starts[i] = static_cast<uint32_t>(blocks);
      const bool split = !has_positions(level.teacher);
      table->levels[i] = {operand_of(level.teacher, !split),
                          level.first,
                          static_cast<uint32_t>(level.c),
                          static_cast<uint32_t>(level.positions()),
                          split ? static_cast<uint32_t>(level.w) : 0,
                          tiles,
                          log_lanes,
                          level.interleaved,
                          wide};
    }
    blocks += is_empty(level) ? 0 : level.n * tiles;
  }
  if (table) {
    table->starts[count] = static_cast<uint32_t>(blocks);
    table->count = static_cast<uint32_t>(count);
  }
  return std::max<int64_t>(blocks, 1);  // levels without any position still have a mass, 0
}

}  // namespace
}  // namespace cuda

int64_t score_workspace(const Score& call) {
  int width;
  cuda::kernel_of(call, width);
  int64_t blocks = 1;
  cuda::each_group(call.count, [&](int64_t first, int64_t count) {
    blocks = std::max(blocks, cuda::plan(call.levels + first, count, width, nullptr));
  });
  return cuda::workspace_bytes(blocks);
}

void score(const Score& call, void* memory, void* stream) {
  int width;
  const cuda::Kernel kernel = cuda::kernel_of(call, width);
  const cuda::Workspace workspace = cuda::workspace_at(memory);
  const int64_t bytes = cuda::bytes_of(call.dtype);
  cuda::each_group(call.count, [&](int64_t first, int64_t count) {
    cuda::ScoreTable table{};
    const int64_t blocks = cuda::plan(call.levels + first, count, width, &table);
    cuda::reset(workspace, "score", stream);
    cuda::launch("score", kernel, blocks, stream, table,
                 cuda::ScoreOutput{call.scores, static_cast<char*>(call.mass) + first * bytes, workspace});
  });
}

}  // namespace frs
