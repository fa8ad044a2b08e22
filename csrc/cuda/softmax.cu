// imitate of softmax_kl: a group of channels is one softmax at every position.
//
//     value_e  = sum_p share_p sum_groups tau^2 value(x_p, z_p)        share_p, terms and total: imitate.cu
//     gradient = weight_t * factor_t * share_p * tau * slope           value, slope: softmax.h
//
// A thread has one packet of neighbouring positions of one group, or one position where packets do not fit, and goes
// over the channels twice: for the maxima and the sums of exponentials, which are scaled anew where a maximum grows,
// and for value and gradient, the second time out of the caches. Warps of a block take neighbouring groups of the same
// positions. Nothing passes between threads, and the scores are needed in the second pass alone: the first runs beside
// the launch that makes them.
#include "../softmax.h"
#include "terms.cuh"
#include "verbs.cuh"

namespace frs {
namespace cuda {
namespace {

// Where a thread works: its first position in the image, and its group's first channel.
struct Place {
  uint32_t n, channel, position;
};

// An operand's numbers at a thread's place, channel after channel.
template <class T>
struct Column {
  char* at;
  int64_t step;  // bytes

  __device__ __forceinline__ Column(const Operand& o, const ImitateRow& row, const Place& place)
      : at(address<T>(o, place.n * o.n + place.channel * o.c + position_offset(o, place.position, row.width))),
        step(o.c * bytes_as<T>(o.dtype)) {}
  __device__ __forceinline__ char* operator[](uint32_t channel) const { return at + channel * step; }
};

// The maximum of a number's logits so far, and the sum of the exponentials of what lies below it.
template <class A>
struct Below {
  A maximum = -std::numeric_limits<A>::infinity(), sum = 0;

  template <int U>
  __device__ __forceinline__ void take(const A (&logits)[U], A inverse_temperature) {
    A most = maximum;
#pragma unroll
    for (int u = 0; u < U; ++u) most = larger(logits[u], most);
    sum *= exp_neg((most - maximum) * inverse_temperature);
#pragma unroll
    for (int u = 0; u < U; ++u) sum += exp_neg((most - logits[u]) * inverse_temperature);
    maximum = most;
  }
};

template <class S, class T, class A, int V>
struct Positions {
  // Channels whose loads are under way together, in the first pass and in the second; fp64 has no registers for more.
  static constexpr uint32_t U = sizeof(A) == 8 ? 1 : 4, LATER = sizeof(A) == 8 ? 1 : 2;

  const ImitateRow& row;
  const Column<S> x, grad;
  const Column<T> z;
  const A inverse_temperature;
  Below<A> of_x[V], of_z[V];

  __device__ __forceinline__ Positions(const ImitateRow& row, const Place& place, A inverse_temperature)
      : row(row),
        x(row.student, row, place),
        grad(row.grad, row, place),
        z(row.teacher, row, place),
        inverse_temperature(inverse_temperature) {}

  template <uint32_t COUNT>
  __device__ __forceinline__ void take(uint32_t c) {
    Held<S, A, V> held_x[COUNT];
    Held<T, A, V> held_z[COUNT];
#pragma unroll
    for (uint32_t u = 0; u < COUNT; ++u) {
      held_x[u].template fetch<Use::again>(x[c + u], 0, row.student.dtype);
      held_z[u].template fetch<Use::again>(z[c + u], 0, row.teacher.dtype);
    }
    A xs[COUNT][V], zs[COUNT][V];
#pragma unroll
    for (uint32_t u = 0; u < COUNT; ++u) held_x[u].widen_to(xs[u]), held_z[u].widen_to(zs[u]);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      A a[COUNT], b[COUNT];
#pragma unroll
      for (uint32_t u = 0; u < COUNT; ++u) a[u] = xs[u][i], b[u] = zs[u][i];
      of_x[i].take(a, inverse_temperature), of_z[i].take(b, inverse_temperature);
    }
  }

  __device__ __forceinline__ void read(uint32_t channels) {
    uint32_t c = 0;
    for (; c + U <= channels; c += U) take<U>(c);
    for (; c < channels; ++c) take<1>(c);
  }

  // The gradients of a group, stored; the sum of share * value.
  __device__ __forceinline__ A work(uint32_t channels, const A (&share)[V], A upstream) const {
    Softmax<A> softmax[V];
    A weight[V], coefficient[V], sums[V] = {};
#pragma unroll
    for (int i = 0; i < V; ++i) {
      softmax[i] = Softmax<A>::of(of_x[i].maximum, of_z[i].maximum, of_x[i].sum, of_z[i].sum, inverse_temperature);
      weight[i] = share[i] / of_x[i].sum;
      coefficient[i] = upstream * weight[i];
    }
#pragma unroll LATER
    for (uint32_t c = 0; c < channels; ++c) {
      Held<S, A, V> held_x;
      Held<T, A, V> held_z;
      held_x.template fetch<Use::once>(x[c], 0, row.student.dtype);
      held_z.template fetch<Use::once>(z[c], 0, row.teacher.dtype);
      A xs[V], zs[V], out[V];
      held_x.widen_to(xs), held_z.widen_to(zs);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A e_x = exp_neg((of_x[i].maximum - xs[i]) * inverse_temperature);
        const A e_z = exp_neg((of_z[i].maximum - zs[i]) * inverse_temperature);
        const auto [value, slope] = softmax[i].at(e_x, e_z, (xs[i] - zs[i]) * inverse_temperature);
        sums[i] += value;
        out[i] = coefficient[i] * slope;
      }
      if (row.grad.data) put<S, A, V>(grad[c], 0, row.grad.dtype, out);
    }
    A sum = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) sum += weight[i] * sums[i];
    return sum;
  }
};

// `row.divider` channels are a group, `row.lines` those of a tile.
template <class S, class T, class A, int V>
__device__ __forceinline__ A work_tile(const ImitateRow& row, const ImitateTerm& term, const Share& share_of,
                                       uint32_t tile_number) {
  const Tile tile = tile_of(row, tile_number);
  const uint32_t group = row.divider, abreast = row.lines / group, warp = threadIdx.x / WARP;
  const uint32_t line = warp % abreast * group, column = (warp / abreast * WARP + threadIdx.x % WARP) * V;
  if (line >= tile.lines || column >= tile.columns) {
    wait_for_previous();
    return 0;
  }
  const Place place{tile.n, tile.line + line, tile.column + column};
  Positions<S, T, A, V> positions(row, place, static_cast<A>(1 / term.temperature));
  positions.read(group);
  wait_for_previous();
  const int64_t first = row.first + static_cast<int64_t>(tile.n) * row.positions + place.position;
  A share[V];
#pragma unroll
  for (int i = 0; i < V; ++i) share[i] = share_of.at<A>(row, first + i);
  const A sum = positions.work(group, share, static_cast<A>(term.upstream() * term.temperature));
  return sum * static_cast<A>(term.temperature * term.temperature);
}

template <class S, class T, class A, int V>
__global__ void __launch_bounds__(THREADS, sizeof(A) == 8 ? 4 : 5)
    softmax_kernel(const __grid_constant__ ImitateTable table, const __grid_constant__ ImitateCall call) {
  const uint32_t index = find_row(table, blockIdx.x);
  A sum = 0;
  if (index < table.count) {
    const ImitateRow& row = table.rows[index];
    const ImitateTerm& term = call.terms[row.term];
    const uint32_t tile = table.starts[index + 1] - 1 - blockIdx.x;
    if (V > 1 && row.walk == Walk::lines)
      sum = work_tile<S, T, A, V>(row, term, call.share, tile);
    else
      sum = work_tile<S, T, A, 1>(row, term, call.share, tile);
  } else {
    wait_for_previous();
  }
  add_up(table, call, sum);
}

struct Chosen {
  void (*kernel)(ImitateTable, ImitateCall);
  int width;  // numbers in a packet
};

template <class S, class T, class A, int V>
constexpr Chosen CHOSEN = {softmax_kernel<S, T, A, V>, V};

Chosen kernel_of(const Imitate& call, const Group& group) {
  const DType s = group.entries[0]->student.dtype, t = group.entries[0]->teacher.dtype;
  if (call.dtype == DType::f64) return CHOSEN<Any, Any, double, 1>;  // two at once spill, and exp takes longest
  if (s == DType::f32)
    return t == DType::bf16  ? CHOSEN<float, bf16, float, 4>
           : t == DType::f16 ? CHOSEN<float, f16, float, 4>
                             : CHOSEN<float, float, float, 4>;
  if (s != t) return CHOSEN<Any, Any, float, 1>;
  return s == DType::bf16 ? CHOSEN<bf16, bf16, float, 4> : CHOSEN<f16, f16, float, 4>;
}

// Fills the table; returns the number of blocks.
int64_t plan(const Imitate& call, const Group& group, int width, ImitateTable& table) {
  int64_t blocks = 0;
  for (size_t i = 0; i < group.entries.size(); ++i) {
    const Entry& entry = *group.entries[i];
    ImitateRow& row = table.rows[i];
    table.starts[i] = static_cast<uint32_t>(blocks);
    row = row_of(call, group, entry);
    if (is_empty(entry)) continue;
    const bool is_lines = width > 1 && !entry.interleaved && is_wide(entry, entry.student, width) &&
                          is_wide(entry, entry.teacher, width) && is_wide(entry, entry.grad, width);
    row.walk = is_lines ? Walk::lines : Walk::numbers;
    uint32_t abreast = 1;  // groups of a block
    while (2 * abreast <= WARPS && 2 * abreast <= entry.c / entry.group) abreast *= 2;
    row.divider = static_cast<uint32_t>(entry.group);
    row.lines = row.divider * abreast;
    row.columns = WARPS / abreast * WARP * (is_lines ? width : 1);
    row.line_tiles = cdiv(entry.c, row.lines);
    row.col_tiles = cdiv(entry.positions(), row.columns);
    blocks += entry.n * row.line_tiles * row.col_tiles;
  }
  table.count = static_cast<uint32_t>(group.entries.size());
  table.starts[table.count] = static_cast<uint32_t>(blocks);
  return blocks;
}

}  // namespace

int64_t softmax_blocks(const Imitate& call) {
  int64_t blocks = 0;
  for (const Group& group : groups_of(call, true)) {
    ImitateTable table{};
    blocks = std::max(blocks, plan(call, group, kernel_of(call, group).width, table));
  }
  return blocks;
}

bool launch_softmax(const Imitate& call, const Workspace& workspace, void* stream, Begin begin) {
  bool any = false;
  for (const Group& group : groups_of(call, true)) {
    const Chosen chosen = kernel_of(call, group);
    ImitateTable table{};
    int64_t blocks = plan(call, group, chosen.width, table);
    if (call.total) blocks = std::max<int64_t>(blocks, 1);  // entries without any position still have a value, 0
    if (blocks == 0) continue;
    launch("imitate", chosen.kernel, blocks, stream, any ? Begin::after_previous : begin, table,
           parameters_of(call, group, workspace));
    any = true;
  }
  return any;
}

}  // namespace cuda
}  // namespace frs
