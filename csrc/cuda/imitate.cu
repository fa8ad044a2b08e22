// imitate: the masked imitation loss of every level and its gradient by the student, in one pass.
//
//     share_p    = S_p / norm_l                                     0 where norm_l is 0
//     loss_l     = sum_p share_p sum_c value(x_pc, z_pc)            (value, slope: pointwise.h)
//     total      = weight * factor * sum_l loss_l
//     gradient   = weight * factor * share_p * slope(x_pc, z_pc)
//
// A block takes a tile of rows by columns of one image (levels.cuh) and puts the shares of its positions into shared
// memory. Its threads walk over the tile's packets, V numbers each, as over one flat run: no lane is idle whatever the
// length of a row, and the loads of U packets of x and z are under way before the first is used.
#include "slots.cuh"

namespace frs {
namespace cuda {
namespace {

constexpr uint32_t MAX_POSITIONS = 1024;  // of a tile: shares take 4 KB of shared memory, 8 in fp64

// Packets of x and of z under way at once. Two pairs of 16 bytes are 64 bytes a thread, and of four blocks 32 KB a
// multiprocessor.
template <Loss LOSS, int V>
constexpr int unroll() {
  if (V == 1) return 8;
  return LOSS == Loss::mse || V < 8 ? 4 : 2;
}
// They are worked on one after another where 16 numbers of bce at once spilled at 128 registers.
template <Loss LOSS, int V>
constexpr bool ONE_BY_ONE = LOSS != Loss::mse && V == 8;
constexpr int MAX_UNROLL = 4;  // of the packets wider than one number

struct ImitateLevel {
  Operand student, teacher, grad;
  int64_t first;
  uint32_t channels, positions;
  uint32_t width;                 // to split positions by, or 0
  uint32_t rows, columns;         // of a tile, in numbers
  uint32_t row_tiles, col_tiles;  // of an image
  uint32_t divider;               // to divide by the packets of a tile's row
  bool interleaved, wide;
};
using ImitateTable = Table<ImitateLevel>;

struct ImitateCall {
  const void *scores, *norm, *factor;
  void *total, *per_level;
  Workspace workspace;
  double weight, temperature;
  DType score_dtype, factor_dtype;
  bool is_first;  // of the launches of a call
};
static_assert(sizeof(ImitateTable) + sizeof(ImitateCall) <= PARAMETER_BYTES);

struct Tile {
  uint32_t n, row, column, rows, columns;  // where it begins, and what of it lies in the level
};

__device__ __forceinline__ Tile tile_of(const ImitateLevel& level, uint32_t tile) {
  // Planar, the channels of some positions are neighbours: in the order in which `score` has read them.
  const uint32_t inner = level.interleaved ? level.col_tiles : level.row_tiles;
  const uint32_t outer = level.interleaved ? level.row_tiles : level.col_tiles;
  const uint32_t i = tile % inner, o = tile / inner % outer;
  const uint32_t row = (level.interleaved ? o : i) * level.rows, column = (level.interleaved ? i : o) * level.columns;
  const uint32_t rows = level.interleaved ? level.positions : level.channels;
  const uint32_t columns = level.interleaved ? level.channels : level.positions;
  return {tile / inner / outer, row, column, min(level.rows, rows - row), min(level.columns, columns - column)};
}

// A packet of a tile: the row and column of its first number.
struct Spot {
  uint32_t row, column;
  bool inside;
};

template <int V>
__device__ __forceinline__ Spot find(const ImitateLevel& level, const Tile& tile, uint32_t packets, uint32_t end,
                                     uint32_t i) {
  const uint32_t row = divide(i, level.divider), column = (i - row * packets) * V;
  return {row, column, i < end && column < tile.columns};
}

// Where the numbers of a tile lie in one operand.
struct Place {
  char* data;           // of the tile's first number, or of the image's where positions have to be split
  int64_t row, column;  // strides

  __device__ __forceinline__ Place(const Operand& operand, const ImitateLevel& level, const Tile& tile)
      : row(level.interleaved ? operand.w : operand.c), column(level.interleaved ? operand.c : operand.w) {
    const int64_t first = tile.n * operand.n + (level.width ? 0 : tile.row * row + tile.column * column);
    data = static_cast<char*>(operand.data) + first * bytes_of(operand.dtype);
  }

  template <int V>
  __device__ __forceinline__ int64_t at(const Operand& operand, const ImitateLevel& level, const Tile& tile,
                                        const Spot& spot) const {
    if constexpr (V > 1) return static_cast<uint64_t>(spot.row) * static_cast<uint32_t>(row) + spot.column;
    if (level.width == 0) return spot.row * row + spot.column * column;
    const uint32_t r = tile.row + spot.row, c = tile.column + spot.column;
    const uint32_t channel = level.interleaved ? c : r, p = level.interleaved ? r : c;
    return channel * operand.c + position_offset(operand, p, level.width);
  }
};

// The shares of a packet: of its positions, or of the one position whose channels it holds.
template <class A, int V>
__device__ __forceinline__ void read_shares(const A* shares, bool interleaved, const Spot& spot, A (&to)[V]) {
  if (interleaved) {
    const A share = shares[spot.row];
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = share;
  } else {
    memcpy(to, __builtin_assume_aligned(shares + spot.column, sizeof(to) < 16 ? sizeof(to) : 16), sizeof(to));
  }
}

// The sum of share * value over this thread's part of the tile; writes its gradients.
template <class S, class T, class A, Loss LOSS, bool WANT_LOSS, int V>
__device__ __forceinline__ A walk(const ImitateLevel& level, const Tile& tile, const A* shares, A upstream, A inverse) {
  constexpr int U = unroll<LOSS, V>();
  const Place student(level.student, level, tile), teacher(level.teacher, level, tile), grad(level.grad, level, tile);
  const uint32_t packets = level.columns / V, end = tile.rows * packets;
  A sum = 0;
  for (uint32_t first = threadIdx.x; first < end; first += U * THREADS) {
    Held<S, A, V> x[U];
    Held<T, A, V> z[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Spot spot = find<V>(level, tile, packets, end, first + u * THREADS);
      if (!spot.inside) continue;
      const int64_t at_x = student.template at<V>(level.student, level, tile, spot);
      const int64_t at_z = teacher.template at<V>(level.teacher, level, tile, spot);
      x[u].template fetch<Use::once>(student.data, at_x, level.student.dtype);
      z[u].template fetch<Use::once>(teacher.data, at_z, level.teacher.dtype);
    }
#pragma unroll(ONE_BY_ONE<LOSS, V> ? 1 : U)
    for (int u = 0; u < U; ++u) {
      const Spot spot = find<V>(level, tile, packets, end, first + u * THREADS);
      if (spot.inside) {
        const auto xs = x[0].packet();
        const auto zs = z[0].packet();
        A share[V], slopes[V], partial = 0;
        read_shares(shares, level.interleaved, spot, share);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const auto [value, slope] = pointwise<LOSS>(A(widen(xs.at[i])), A(widen(zs.at[i])), inverse);
          if constexpr (WANT_LOSS) partial += share[i] * value;
          slopes[i] = upstream * share[i] * slope;
        }
        sum += partial;
        if (level.grad.data) {
          const int64_t at = grad.template at<V>(level.grad, level, tile, spot);
          put<S, A, V>(grad.data, at, level.grad.dtype, slopes);
        }
      }
#pragma unroll
      for (int next = 1; next < U; ++next) {
        x[next - 1] = x[next];
        z[next - 1] = z[next];
      }
    }
  }
  return sum;
}

template <class A>
__device__ __forceinline__ A share_of(const ImitateCall& call, uint32_t level, int64_t at) {
  if (call.score_dtype == DType::f64) {
    const double norm = static_cast<const double*>(call.norm)[level];
    return static_cast<A>(norm == 0 ? 0 : static_cast<const double*>(call.scores)[at] / norm);
  }
  const float norm = static_cast<const float*>(call.norm)[level];
  return norm == 0 ? 0 : static_cast<const float*>(call.scores)[at] / norm;
}

// Four blocks a multiprocessor leave a thread 128 registers, five leave it 96, enough for mse.
template <class S, class T, class A, Loss LOSS, bool WANT_LOSS, int V>
__global__ void __launch_bounds__(THREADS, LOSS == Loss::mse && sizeof(A) == 4 ? 5 : 4)
    imitate_kernel(const __grid_constant__ ImitateTable table, const __grid_constant__ ImitateCall call) {
  alignas(16) __shared__ A shares[MAX_POSITIONS];
  // Backwards: the logits that `score` has read last may still be in L2, and the coarse levels, whose rows allow no
  // 16-byte loads, are not left for the end.
  const uint32_t block = gridDim.x - 1 - blockIdx.x;
  const uint32_t index = find_level(table, block);
  const double upstream = call.weight * (call.factor ? read_number(call.factor, call.factor_dtype) : 1.0);
  A sum = 0;
  if (index < table.count) {
    const ImitateLevel& level = table.levels[index];
    const Tile tile = tile_of(level, block - table.starts[index]);
    const uint32_t p0 = level.interleaved ? tile.row : tile.column;
    const uint32_t count = level.interleaved ? tile.rows : tile.columns;
    const int64_t first = level.first + static_cast<int64_t>(tile.n) * level.positions + p0;
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) shares[i] = share_of<A>(call, index, first + i);
    __syncthreads();
    const double temperature = LOSS == Loss::mse ? 1 : call.temperature;
    const A inverse = static_cast<A>(1 / temperature), slope_factor = static_cast<A>(upstream * temperature);
    if (V > 1 && level.wide)
      sum = walk<S, T, A, LOSS, WANT_LOSS, V>(level, tile, shares, slope_factor, inverse);
    else
      sum = walk<S, T, A, LOSS, WANT_LOSS, 1>(level, tile, shares, slope_factor, inverse);
    sum *= static_cast<A>(temperature * temperature);
  }
  if (!WANT_LOSS || call.total == nullptr || !store_partial(call.workspace, block, sum)) return;
  double total = sum_levels(call.workspace, table,
                            [&](uint32_t i, double s) { static_cast<A*>(call.per_level)[i] = static_cast<A>(s); });
  if (threadIdx.x == 0) {
    if (!call.is_first) total += *call.workspace.carry;
    *call.workspace.carry = total;
    *static_cast<A*>(call.total) = static_cast<A>(upstream * total);
  }
}

using Kernel = void (*)(ImitateTable, ImitateCall);

// bce alone has a kernel without the loss: in bf16 that saves a sixth of the instructions. mse would save one a number,
// and the gradient of kl is that of bce.
template <class S, class T, class A, int V>
Kernel kernel_of(Loss loss, bool want_loss) {
  if (loss == Loss::mse) return imitate_kernel<S, T, A, Loss::mse, true, V>;
  if (!want_loss) return imitate_kernel<S, T, A, Loss::bce, false, V>;
  return loss == Loss::bce ? imitate_kernel<S, T, A, Loss::bce, true, V> : imitate_kernel<S, T, A, Loss::kl, true, V>;
}

// One pair of dtypes for all levels has kernels of its own if training uses it: one dtype, or fp32 from a teacher in 16
// bits. Other pairs, and levels that mix, take loads of any dtype, one number at a time.
Kernel kernel_of(const Imitate& call, int& width) {
  width = 1;
  const bool want_loss = call.total != nullptr;
  const DType s = call.count ? call.levels->student.dtype : DType::f32;
  const DType t = call.count ? call.levels->teacher.dtype : DType::f32;
  const bool same = std::all_of(call.levels, call.levels + call.count, [=](const Level& level) {
    return level.student.dtype == s && level.teacher.dtype == t;
  });
  if (call.dtype == DType::f64) {
    if (!same || s != DType::f64 || t != DType::f64) return kernel_of<Any, Any, double, 1>(call.loss, want_loss);
    width = 2;
    return kernel_of<double, double, double, 2>(call.loss, want_loss);
  }
  if (same && s == DType::f32) {
    width = 4;
    if (t == DType::bf16) return kernel_of<float, bf16, float, 4>(call.loss, want_loss);
    if (t == DType::f16) return kernel_of<float, f16, float, 4>(call.loss, want_loss);
    return kernel_of<float, float, float, 4>(call.loss, want_loss);
  }
  width = same && s == t ? 8 : 1;
  if (width == 1) return kernel_of<Any, Any, float, 1>(call.loss, want_loss);
  return s == DType::bf16 ? kernel_of<bf16, bf16, float, 8>(call.loss, want_loss)
                          : kernel_of<f16, f16, float, 8>(call.loss, want_loss);
}

// n cut into equal parts of at most `most`; where they are several, a multiple of `granule` each.
uint32_t part_of(int64_t n, int64_t most, int64_t granule) {
  const int64_t parts = cdiv(n, most);
  return parts == 1 ? static_cast<uint32_t>(n) : static_cast<uint32_t>(cdiv(cdiv(n, parts), granule) * granule);
}

// Rows and columns of a tile of about `size` numbers. A planar row is 256 positions, so that a tile has several of them
// and reads its shares once for all; where channels are few, rows are longer.
void cut(const Level& level, int64_t size, ImitateLevel& entry) {
  constexpr int64_t GRANULE = 8;  // the widest packet
  if (level.interleaved) {
    entry.columns = part_of(level.c, 4096, GRANULE);
    entry.rows = part_of(level.positions(), std::clamp<int64_t>(size / entry.columns, 1, MAX_POSITIONS), 1);
  } else {
    entry.columns = part_of(level.positions(), level.c > 8 ? 256 : MAX_POSITIONS, GRANULE);
    entry.rows = part_of(level.c, std::max<int64_t>(size / entry.columns, 1), 1);
  }
  entry.row_tiles = cdiv(level.interleaved ? level.positions() : level.c, entry.rows);
  entry.col_tiles = cdiv(level.interleaved ? level.c : level.positions(), entry.columns);
}

// Fills the table for kernels that move `widest` numbers at once; returns the number of blocks, which does not depend
// on where the tensors lie.
int64_t plan(const Level* levels, int64_t count, int widest, ImitateTable& table) {
  // Up to four rounds of MAX_UNROLL packets a block, as long as some BLOCKS blocks remain.
  int64_t numbers = 0;
  for (int64_t i = 0; i < count; ++i)
    numbers += is_empty(levels[i]) ? 0 : levels[i].n * levels[i].c * levels[i].positions();
  const int64_t round = static_cast<int64_t>(THREADS) * MAX_UNROLL * std::max(widest, 2);
  const int64_t size = round * std::clamp<int64_t>(numbers / (round * BLOCKS), 1, 4);
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Level& level = levels[i];
    check_sizes(level, "imitate");
    ImitateLevel& entry = table.levels[i];
    table.starts[i] = static_cast<uint32_t>(blocks);
    if (is_empty(level)) continue;
    const bool split = !has_positions(level.student, level.teacher, level.grad);
    entry.student = operand_of(level.student, !split);
    entry.teacher = operand_of(level.teacher, !split);
    entry.grad = operand_of(level.grad, !split);
    entry.first = level.first;
    entry.channels = static_cast<uint32_t>(level.c);
    entry.positions = static_cast<uint32_t>(level.positions());
    entry.width = split ? static_cast<uint32_t>(level.w) : 0;
    entry.interleaved = level.interleaved;
    entry.wide = widest > 1 && is_wide(level, level.student, widest) && is_wide(level, level.teacher, widest) &&
                 is_wide(level, level.grad, widest);
    cut(level, size, entry);
    entry.divider = divider(entry.columns / (entry.wide ? widest : 1));
    blocks += level.n * entry.row_tiles * entry.col_tiles;
  }
  table.starts[count] = static_cast<uint32_t>(blocks);
  table.count = static_cast<uint32_t>(count);
  return blocks;
}

}  // namespace
}  // namespace cuda

int64_t imitate_workspace(const Imitate& call) {
  int width;
  cuda::kernel_of(call, width);
  int64_t blocks = 1;
  cuda::each_group(call.count, [&](int64_t first, int64_t count) {
    cuda::ImitateTable table{};
    blocks = std::max(blocks, cuda::plan(call.levels + first, count, width, table));
  });
  return cuda::workspace_bytes(blocks);
}

void imitate(const Imitate& call, void* memory, void* stream) {
  int width;
  const cuda::Kernel kernel = cuda::kernel_of(call, width);
  const cuda::Workspace workspace = cuda::workspace_at(memory);
  cuda::each_group(call.count, [&](int64_t first, int64_t count) {
    cuda::ImitateTable table{};
    int64_t blocks = cuda::plan(call.levels + first, count, width, table);
    if (call.total) {
      cuda::reset(workspace, "imitate", stream);
      blocks = std::max<int64_t>(blocks, 1);  // levels without any position still have a loss, 0
    } else if (blocks == 0) {
      return;
    }
    cuda::launch("imitate", kernel, blocks, stream, table,
                 cuda::ImitateCall{
                     call.scores,
                     static_cast<const char*>(call.norm) + first * cuda::bytes_of(call.score_dtype),
                     call.factor,
                     call.total,
                     static_cast<char*>(call.per_level) + first * cuda::bytes_of(call.dtype),
                     workspace,
                     call.weight,
                     call.temperature,
                     call.score_dtype,
                     call.factor_dtype,
                     first == 0,
                 });
  });
}

}  // namespace frs
