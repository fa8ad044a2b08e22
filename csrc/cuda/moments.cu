// moments: the losses along rows, and of every row the five numbers (s0, t0, a, b, c) that its gradient is made of.
// moments_backward: that gradient.
//
//     value_l  = scale_l / rows_l * sum over a level's rows of what row_losses.h says of each
//     total    = weight * factor * sum_l value_l
//     gradient = weight * factor * slope(s, t, s0, t0, a, b, c)
//
// A launch takes all levels of one pair of dtypes. A block adds up its parts of rows (row_parts.cuh); the one that
// comes last of a group of rows adds their parts and finishes them, the one that finishes the last group adds the
// groups.
#include <cmath>
#include <vector>

#include "row_parts.cuh"
#include "row_plan.cuh"

namespace frs {
namespace cuda {
namespace {

constexpr int RESIDENT = 4;  // blocks of a multiprocessor: as many as leave 8 channels' sums in registers

struct MomentsCall {
  GroupSpans groups;
  Workspace workspace;  // terms: the sum of all values; slots: a value a group
  uint32_t* counters;   // a group: zero when a launch starts; the group's last block puts it back
  Sums* parts;
  double weight, temperature, eps;
  const void* factor;
  void *total, *values, *rows;
  DType factor_dtype;
};
static_assert(sizeof(RowTable) + sizeof(MomentsCall) <= PARAMETER_BYTES);

struct AlignCall {
  double weight, temperature;
  const void* factor;
  const void* rows;
  DType factor_dtype;
};

template <class C>
__device__ __forceinline__ double upstream_of(const C& call) {
  return call.weight * (call.factor ? read_number(call.factor, call.factor_dtype) : 1.0);
}

// True in the block that comes last of so many, which then sees what the others have stored.
__device__ __forceinline__ bool comes_last(uint32_t* counter, uint32_t blocks) {
  __shared__ bool is_last;
  __syncthreads();  // what the block has stored before its count
  if (threadIdx.x == 0) {
    is_last = count_block(counter) == blocks - 1;
    if (is_last) {
      *counter = 0;
      __threadfence();  // the count before the reads of what the others have stored
    }
  }
  __syncthreads();
  return is_last;
}

__device__ __forceinline__ Sums load_sums(const Sums* from) {
  Sums sums;
#pragma unroll
  for (int k = 0; k < NUMBERS; ++k) sums.at[k] = __ldcg(from->at + k);
  return sums;
}

// Numbers and values of a group's rows, some threads a row; the sum of the values, in the first thread.
template <class S, class T, class A, RowLoss LOSS>
__device__ __forceinline__ double finish_group(const RowLevel& level, uint32_t group, const MomentsCall& call) {
  using Of = RowTraits<LOSS>;
  constexpr int FIRST = Part<LOSS, A>::FIRST;
  constexpr uint32_t U = 4;  // parts under way
  __shared__ Sums met[THREADS];
  __shared__ double values[WARPS];
  const RowRange rows = rows_of(level, group);
  const uint32_t threads = 1u << level.log_finishers, thread = threadIdx.x & (threads - 1);
  const uint32_t within = threadIdx.x >> level.log_finishers, row = rows.first + within;
  const bool inside = within < rows.count;
  const Sums* const parts = call.parts + level.first_part + static_cast<int64_t>(row) * level.parts;
  Sums sums = Of::none();
  if constexpr (FIRST > 0) {
    if (inside)
      for (uint32_t part = thread; part < level.parts; part += threads)
        for (int k = 0; k < FIRST; ++k) sums.at[k] = larger(sums.at[k], __ldcg(parts[part].at + k));
    met[threadIdx.x] = sums;
    __syncthreads();
    for (uint32_t i = threadIdx.x - thread; i < threadIdx.x - thread + threads; ++i)
      for (int k = 0; k < FIRST; ++k) sums.at[k] = larger(sums.at[k], met[i].at[k]);
    __syncthreads();
  }
  if (inside)
    for (uint32_t first = thread; first < level.parts; first += U * threads) {
      Sums held[U];
#pragma unroll
      for (uint32_t u = 0; u < U; ++u)
        if (first + u * threads < level.parts) held[u] = load_sums(parts + first + u * threads);
#pragma unroll
      for (uint32_t u = 0; u < U; ++u) {
        if (first + u * threads >= level.parts) continue;
        if constexpr (FIRST > 0) held[u] = Of::raised(held[u], sums.at[0], sums.at[1], call.temperature);
#pragma unroll
        for (int k = FIRST; k < NUMBERS; ++k) sums.at[k] += held[u].at[k];
      }
    }
  met[threadIdx.x] = sums;
  __syncthreads();
  double value = 0;
  if (inside && thread == 0) {
    for (uint32_t i = 1; i < threads; ++i)
      for (int k = FIRST; k < NUMBERS; ++k) sums.at[k] += met[threadIdx.x + i].at[k];
    RowOf of{static_cast<double>(Of::per_image ? 1 : level.images) * level.positions,
             static_cast<double>(level.all_rows),
             level.scale,
             call.temperature,
             call.eps,
             0,
             0};
    if (!Of::per_image && level.parts) {
      Spot at{};
      at.c = row;
      const auto pivots = pivots_of_row<S, T, A>(level, at);
      of.pivot_s = pivots.s[0], of.pivot_t = pivots.t[0];
    }
    value = Of::finish(sums, of, static_cast<A*>(call.rows) + (level.first + row) * NUMBERS);
  }
  value = warp_sum(value);
  if (threadIdx.x % WARP == 0) values[threadIdx.x / WARP] = value;
  __syncthreads();
  for (uint32_t warp = 1; warp < WARPS; ++warp) value += values[warp];
  return value;
}

template <class S, class T, class A, int V, RowLoss LOSS>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    moments_kernel(const __grid_constant__ RowTable table, const __grid_constant__ MomentsCall call) {
  __shared__ Meeting<A, V> meeting;
  const uint32_t index = find_row(table, blockIdx.x);
  if (index < table.count) {
    const RowLevel& level = table.rows[index];
    const Place place = place_of(level, blockIdx.x - table.starts[index]);
    const A pace = static_cast<A>(LOG2_E / call.temperature);
    Sums* const parts = call.parts + level.first_part;
    const auto sum = [&](auto width) {
      constexpr int W = decltype(width)::value;
      if (level.interleaved)
        sum_tile<S, T, A, W, LOSS>(level, place, pace, parts, meeting);
      else
        sum_run<S, T, A, W, LOSS>(level, place, pace, parts);
    };
    if (V > 1 && level.wide)
      sum(std::integral_constant<int, V>{});
    else
      sum(std::integral_constant<int, 1>{});
    const uint32_t group = call.groups.starts[index] + place.group;
    if (!comes_last(call.counters + group, level.blocks)) return;
    const double value = finish_group<S, T, A, LOSS>(level, place.group, call);
    if (threadIdx.x == 0) call.workspace.slots[group] = value;
    if (!comes_last(call.workspace.counter, call.groups.starts[table.count])) return;
  }
  A* const values = static_cast<A*>(call.values);
  const double* const sums = sum_rows(
      call.workspace, call.groups, [&](uint32_t i, double s) { values[1 + table.rows[i].entry] = static_cast<A>(s); });
  if (threadIdx.x != 0) return;
  double value = *call.workspace.total;  // of the launches before
  for (uint32_t i = 0; i < table.count; ++i) value += sums[i];
  *call.workspace.total = value;
  values[0] = static_cast<A>(value);
  *static_cast<A*>(call.total) = static_cast<A>(upstream_of(call) * value);
}

// The gradients of a thread's packets, of one row or of one row a number.
template <class S, class T, class A, int V, RowLoss LOSS, bool INTERLEAVED>
__device__ __forceinline__ void align(const RowLevel& level, const Place& place, const AlignCall& call) {
  constexpr int ROWS = INTERLEAVED ? V : 1;
  const Spot at = spot_of<S, V, RowTraits<LOSS>::per_image, INTERLEAVED>(level, place);
  if (!at.inside) return;
  const A inverse_temperature = static_cast<A>(1 / call.temperature), upstream = static_cast<A>(upstream_of(call));
  A of[ROWS][NUMBERS];
  const A* const numbers = static_cast<const A*>(call.rows) + (level.first + at.row) * NUMBERS;
#pragma unroll
  for (int i = 0; i < ROWS * NUMBERS; ++i) {
    const int k = i % NUMBERS;
    of[i / NUMBERS][k] = numbers[i] * (k < 2 ? 1 : upstream);
  }
  const Line<S, V> grad(level.grad, at, level.width);
  constexpr uint32_t U = sizeof(A) == 8 ? UNDER_WAY / 2 : UNDER_WAY;
  walk<Both<S, T, A, V>, U, INTERLEAVED>(level, at, [&](const auto& both, uint32_t taken, uint32_t p, uint32_t step) {
    constexpr int COUNT = std::remove_reference_t<decltype(both[0])>::V;
#pragma unroll
    for (uint32_t u = 0; u < std::extent_v<std::remove_reference_t<decltype(both)>>; ++u) {
      if (u > 0 && u >= taken) continue;
      A s[COUNT], t[COUNT], out[COUNT];
      both[u].s.widen_to(s), both[u].t.widen_to(t);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const A* const row = of[i % ROWS];
        out[i] = RowTraits<LOSS>::slope(s[i], t[i], row[0], row[1], row[2], row[3], row[4], inverse_temperature);
      }
      put<S, A, COUNT>(grad.at(p + u * step), 0, level.grad.dtype, out);
    }
  });
}

template <class S, class T, class A, int V, RowLoss LOSS>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    moments_backward_kernel(const __grid_constant__ RowTable table, const __grid_constant__ AlignCall call) {
  const uint32_t index = find_row(table, blockIdx.x);
  const RowLevel& level = table.rows[index];
  const Place place = place_of(level, blockIdx.x - table.starts[index]);
  const auto work = [&](auto width) {
    constexpr int W = decltype(width)::value;
    if (level.interleaved)
      align<S, T, A, W, LOSS, true>(level, place, call);
    else
      align<S, T, A, W, LOSS, false>(level, place, call);
  };
  if (V > 1 && level.wide)
    work(std::integral_constant<int, V>{});
  else
    work(std::integral_constant<int, 1>{});
}

struct Chosen {
  void (*moments)(RowTable, MomentsCall);
  void (*backward)(RowTable, AlignCall);
  int width;  // numbers in a packet
};

template <class S, class T, class A, int V, RowLoss LOSS>
constexpr Chosen CHOSEN{moments_kernel<S, T, A, V, LOSS>, moments_backward_kernel<S, T, A, V, LOSS>, V};

// A pair of dtypes that training uses has kernels of its own: one dtype, or fp32 from a teacher in 16 bits. Others take
// loads of any dtype, one number at a time.
template <RowLoss LOSS>
Chosen kernels_of(DType s, DType t, DType dtype) {
  if (dtype == DType::f64)
    return s == DType::f64 && t == s ? CHOSEN<double, double, double, 2, LOSS> : CHOSEN<Any, Any, double, 1, LOSS>;
  if (s == DType::f32) {
    if (t == DType::bf16) return CHOSEN<float, bf16, float, 4, LOSS>;
    return t == DType::f16 ? CHOSEN<float, f16, float, 4, LOSS> : CHOSEN<float, float, float, 4, LOSS>;
  }
  if (s != t) return CHOSEN<Any, Any, float, 1, LOSS>;
  return s == DType::bf16 ? CHOSEN<bf16, bf16, float, 8, LOSS> : CHOSEN<f16, f16, float, 8, LOSS>;
}

struct Launch {
  Chosen chosen;
  RowPlan plan;
};

// The launches of a call, as far as each: levels of one pair of dtypes, at most MAX_ROWS.
template <class C>
std::vector<Launch> launches_of(const C& call, const double* scale, const char* verb) {
  std::vector<std::vector<int64_t>> groups;
  for (int64_t i = 0; i < call.count; ++i) {
    const Level& level = call.levels[i];
    check_rows(level, verb);
    const auto fits = [&](const std::vector<int64_t>& group) {
      const Level& first = call.levels[group[0]];
      return group.size() < MAX_ROWS && first.student.dtype == level.student.dtype &&
             first.teacher.dtype == level.teacher.dtype;
    };
    auto known = std::find_if(groups.begin(), groups.end(), fits);
    if (known == groups.end()) known = groups.insert(known, std::vector<int64_t>{});
    known->push_back(i);
  }
  std::vector<Launch> launches;
  for (const auto& group : groups)
    with_row_loss(call.loss, [&](auto loss) {
      constexpr RowLoss LOSS = decltype(loss)::value;
      const Level& first = call.levels[group[0]];
      const Chosen chosen = kernels_of<LOSS>(first.student.dtype, first.teacher.dtype, call.dtype);
      launches.push_back({chosen, plan_rows(call.levels, group, scale, RowTraits<LOSS>::per_image, chosen.width)});
    });
  return launches;
}

// Head, counters, the groups' values, the rows' parts.
struct Sizes {
  int64_t counters = 0, groups = 0, parts = 0;  // bytes

  explicit Sizes(const std::vector<Launch>& launches) {
    for (const Launch& launch : launches) {
      const int64_t count = launch.plan.groups.starts[launch.plan.groups.count];
      counters = std::max(counters, (4 * count + 15) / 16 * 16);
      groups = std::max(groups, (8 * count + 15) / 16 * 16);
      parts = std::max(parts, launch.plan.parts * static_cast<int64_t>(sizeof(Sums)));
    }
  }
  int64_t zeroed() const { return head_bytes(0) + counters; }
};

}  // namespace
}  // namespace cuda

int64_t moments_workspace(const Moments& call) {
  const cuda::Sizes sizes(cuda::launches_of(call, call.scale, "moments"));
  return sizes.zeroed() + sizes.groups + sizes.parts;
}

void moments(const Moments& call, void* memory, void* stream) {
  const auto launches = cuda::launches_of(call, call.scale, "moments");
  const cuda::Sizes sizes(launches);
  cuda::check(cudaMemsetAsync(memory, 0, sizes.zeroed(), static_cast<cudaStream_t>(stream)), "moments");
  char* const counters = static_cast<char*>(memory) + cuda::head_bytes(0);
  cuda::Workspace workspace = cuda::workspace_at(memory, 0);
  workspace.slots = reinterpret_cast<double*>(counters + sizes.counters);
  for (const cuda::Launch& each : launches) {
    const cuda::MomentsCall parameters{each.plan.groups,
                                       workspace,
                                       reinterpret_cast<uint32_t*>(counters),
                                       reinterpret_cast<Sums*>(counters + sizes.counters + sizes.groups),
                                       call.weight,
                                       call.temperature,
                                       call.eps,
                                       call.factor,
                                       call.total,
                                       call.values,
                                       call.rows,
                                       call.factor_dtype};
    // Without any rows there still are values, 0.
    cuda::launch("moments", each.chosen.moments, std::max<int64_t>(each.plan.blocks, 1), stream,
                 cuda::Begin::after_previous, each.plan.table, parameters);
  }
}

void moments_backward(const MomentsBackward& call, void* stream) {
  const cuda::AlignCall parameters{call.weight, call.temperature, call.factor, call.rows, call.factor_dtype};
  for (const cuda::Launch& each : cuda::launches_of(call, nullptr, "moments_backward"))
    if (each.plan.parts)
      cuda::launch("moments_backward", each.chosen.backward, each.plan.blocks, stream, cuda::Begin::after_previous,
                   each.plan.table, parameters);
}

}  // namespace frs
