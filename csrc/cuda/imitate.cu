// imitate: the masked imitation losses of a table of entries and their gradients by the student, in one pass.
//
//     share_p  = scale * S_p / (norm_l + eps)                      0 where the denominator is 0
//                                                                  joint: norm_l is the sum of all levels' norms
//     value_e  = sum_p share_p sum_c value(x_pc, z_pc)             of an entry (value, slope: pointwise.h)
//     value_t  = the sum of its entries' values                    of a term
//     total    = sum_t weight_t * factor_t * value_t
//     gradient = weight_t * factor_t * share_p * slope(x_pc, z_pc)
//
// A launch takes all entries of one pair of dtypes: class logits first, the last level first, since `score` has read
// that last. A block takes a tile of one image and goes over it as walks.cuh says. Losses of groups have launches of
// their own, softmax.cu.
#include "terms.cuh"
#include "verbs.cuh"

namespace frs {
namespace cuda {
namespace {

// The sum of share * value over a tile; writes its gradients.
template <class W>
__device__ __forceinline__ typename W::A work_tile(const ImitateRow& row, const ImitateTerm& term, const Share& share,
                                                   uint32_t tile_number, typename W::A* shares) {
  using A = typename W::A;
  const double temperature = W::TEMPERED ? term.temperature : 1;
  const Coefficients<A> with{static_cast<A>(term.upstream() * temperature), static_cast<A>(1 / temperature),
                             static_cast<A>(term.beta)};
  const Tile tile = tile_of(row, tile_number);
  A sum;
  if constexpr (W::V > 1) {
    if (row.walk == Walk::lines)
      sum = walk_lines<W>(row, tile, share, with, shares);
    else if (row.walk == Walk::run)
      sum = walk_flat<W, true>(row, tile, share, with, shares);
    else if (row.walk == Walk::positions)
      sum = walk_flat<W, false>(row, tile, share, with, shares);
    else
      sum = walk_numbers<W>(row, tile, share, with, shares);
  } else {
    sum = walk_numbers<W>(row, tile, share, with, shares);
  }
  return sum * static_cast<A>(temperature * temperature);
}

// What is wanted, as far as it is known when a kernel is compiled.
enum class Want { both, loss, grad, any };

// Blocks of a multiprocessor: the more, the more loads are under way. As many as leave a kernel's registers unspilled,
// which is one more on sm_90.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int MORE = 1;
#else
constexpr int MORE = 0;
#endif
template <class A, int V, Want WANT>
constexpr int RESIDENT = sizeof(A) == 8 || WANT == Want::any ? 4 : (V == 4 ? 7 : 6) + MORE;

template <class S, class T, class A, int V, class LOSSES, Want WANT>
__global__ void __launch_bounds__(THREADS, RESIDENT<A, V, WANT>)
    imitate_kernel(const __grid_constant__ ImitateTable table, const __grid_constant__ ImitateCall call) {
  constexpr bool WANT_LOSS = WANT != Want::grad, WANT_GRAD = WANT != Want::loss, ANY = WANT == Want::any;
  [[maybe_unused]] alignas(16) __shared__ A shares[MAX_SHARES + V];
  const uint32_t index = find_row(table, blockIdx.x);
  A sum = 0;
  if (index < table.count) {
    const ImitateRow& row = table.rows[index];
    const ImitateTerm& term = call.terms[row.term];
    const uint32_t tile = table.starts[index + 1] - 1 - blockIdx.x;  // the last first, too
    LOSSES::with(term.loss, [&](auto loss) {
      using W = Work<S, T, A, V, decltype(loss)::value, ANY, WANT_LOSS, WANT_GRAD, ANY>;
      sum = work_tile<W>(row, term, call.share, tile, shares);
    });
  } else {
    wait_for_previous();
  }
  if (WANT_LOSS) add_up(table, call, sum);
}

using Kernel = void (*)(ImitateTable, ImitateCall);

struct Chosen {
  Kernel kernel;
  int width;  // numbers in a packet
};

// The usual case, mse and bce at temperature 1, has kernels that know what is wanted; all else shares one.
template <class S, class T, int V>
Chosen kernel_of(const Imitate& call, const Group& group) {
  using Usual = Losses<Loss::mse, Loss::bce>;
  const bool usual = std::all_of(group.terms.begin(), group.terms.end(), [&](int64_t t) {
    return Usual::contain(call.terms[t].loss) && call.terms[t].temperature == 1;
  });
  const auto wants = [](const Entry* entry) { return entry->grad.data != nullptr; };
  const bool all = std::all_of(group.entries.begin(), group.entries.end(), wants);
  const bool none = std::none_of(group.entries.begin(), group.entries.end(), wants);
  if (usual && all && call.total) return {imitate_kernel<S, T, float, V, Usual, Want::both>, V};
  if (usual && all) return {imitate_kernel<S, T, float, V, Usual, Want::grad>, V};
  if (usual && none) return {imitate_kernel<S, T, float, V, Usual, Want::loss>, V};
  return {imitate_kernel<S, T, float, V, EveryPointwise, Want::any>, V};
}

// A pair of dtypes that training uses has kernels of its own: one dtype, or fp32 from a teacher in 16 bits. Others take
// loads of any dtype, one number at a time.
Chosen kernel_of(const Imitate& call, const Group& group) {
  const DType s = group.entries[0]->student.dtype, t = group.entries[0]->teacher.dtype;
  if (call.dtype == DType::f64) {
    if (s == DType::f64 && t == DType::f64)
      return {imitate_kernel<double, double, double, 2, EveryPointwise, Want::any>, 2};
    return {imitate_kernel<Any, Any, double, 1, EveryPointwise, Want::any>, 1};
  }
  if (s == DType::f32) {
    if (t == DType::bf16) return kernel_of<float, bf16, 4>(call, group);
    if (t == DType::f16) return kernel_of<float, f16, 4>(call, group);
    return kernel_of<float, float, 4>(call, group);
  }
  if (s != t) return {imitate_kernel<Any, Any, float, 1, EveryPointwise, Want::any>, 1};
  return s == DType::bf16 ? kernel_of<bf16, bf16, 8>(call, group) : kernel_of<f16, f16, 8>(call, group);
}

// n cut into equal parts of at most `most`; where they are several, a multiple of `granule` each.
uint32_t part_of(int64_t n, int64_t most, int64_t granule) {
  const int64_t parts = cdiv(n, most);
  return parts == 1 ? static_cast<uint32_t>(n) : static_cast<uint32_t>(cdiv(cdiv(n, parts), granule) * granule);
}

Walk walk_of(const Entry& entry, int width) {
  const auto all = [&](auto&& is) {
    return is(entry, entry.student, width) && is(entry, entry.teacher, width) && is(entry, entry.grad, width);
  };
  if (width == 1) return Walk::numbers;
  if (entry.interleaved) return all(is_wide) ? Walk::positions : Walk::numbers;
  const bool is_run = all(is_flat) && entry.c * entry.positions() <= UINT32_MAX / 2;
  const bool is_lines = all(is_wide);
  // Lines shorter than a few warps leave lanes idle, as channels fewer than the warps of a block leave warps.
  if (is_run && (!is_lines || entry.positions() + width <= MAX_SHARES || entry.c < 2 * WARPS)) return Walk::run;
  return is_lines ? Walk::lines : Walk::numbers;
}

// Lines and columns of a tile of about `size` numbers.
void cut(const Entry& entry, int64_t size, int width, ImitateRow& row) {
  constexpr int64_t GRANULE = 8;  // the widest packet
  const int64_t positions = entry.positions(), all = entry.c * positions;
  int64_t line_count = entry.c, column_count = positions;
  switch (row.walk) {
    case Walk::lines:
      row.columns = WARP * width;
      row.lines = part_of(entry.c, std::max<int64_t>(size / row.columns, 1), WARPS);
      break;
    case Walk::run:
      row.columns = part_of(all, positions + width <= MAX_SHARES ? size : MAX_SHARES - GRANULE, GRANULE);
      row.lines = 1, line_count = 1, column_count = all;
      row.divider = divider(row.positions);
      break;
    default:
      if (entry.interleaved) {
        row.columns = part_of(entry.c, 4096, GRANULE);
        row.lines = part_of(positions, std::clamp<int64_t>(size / row.columns, 1, MAX_SHARES), 1);
        line_count = positions, column_count = entry.c;
      } else {
        row.columns = part_of(positions, entry.c > 8 ? 256 : 1024, GRANULE);
        row.lines = part_of(entry.c, std::max<int64_t>(size / row.columns, 1), 1);
      }
      row.divider = divider(row.columns / (row.walk == Walk::numbers ? 1 : width));
  }
  row.line_tiles = cdiv(line_count, row.lines);
  row.col_tiles = cdiv(column_count, row.columns);
}

// Numbers of a tile. The longer a tile, the less of its time is its beginning and end; the fewer there are, the more of
// them the last to end keep waiting. Rounds are of ROUND packets a thread: as many as leave some BLOCKS blocks, at most
// 8, or 16 where there are more than enough (docs/performance.md).
int64_t tile_size(const Imitate& call, int width) {
  constexpr int64_t ROUND = 4;
  int64_t numbers = 0;
  for (int64_t i = 0; i < call.count; ++i)
    numbers += is_empty(call.entries[i]) ? 0 : call.entries[i].n * call.entries[i].c * call.entries[i].positions();
  const int64_t round = static_cast<int64_t>(THREADS) * ROUND * std::max(width, 2);
  const int64_t rounds = (numbers + round * BLOCKS / 2) / (round * BLOCKS);
  return round * (rounds >= 64 ? 16 : std::clamp<int64_t>(rounds, 1, 8));
}

// Fills the table; returns the number of blocks.
int64_t plan(const Imitate& call, const Group& group, int width, ImitateTable& table) {
  const int64_t size = tile_size(call, width);
  int64_t blocks = 0;
  for (size_t i = 0; i < group.entries.size(); ++i) {
    const Entry& entry = *group.entries[i];
    ImitateRow& row = table.rows[i];
    table.starts[i] = static_cast<uint32_t>(blocks);
    row = row_of(call, group, entry);
    if (is_empty(entry)) continue;
    row.interleaved = entry.interleaved;
    row.walk = walk_of(entry, width);
    cut(entry, size, width, row);
    blocks += entry.n * row.line_tiles * row.col_tiles;
  }
  table.count = static_cast<uint32_t>(group.entries.size());
  table.starts[table.count] = static_cast<uint32_t>(blocks);
  return blocks;
}

}  // namespace

int64_t imitate_blocks(const Imitate& call) {
  int64_t blocks = 1;
  for (const Group& group : groups_of(call, false)) {
    ImitateTable table{};
    blocks = std::max(blocks, plan(call, group, kernel_of(call, group).width, table));
  }
  return std::max(blocks, softmax_blocks(call));
}

void launch_imitate(const Imitate& call, const Workspace& workspace, void* stream, Begin begin) {
  if (launch_softmax(call, workspace, stream, begin)) begin = Begin::after_previous;
  for (const Group& group : groups_of(call, false)) {
    const Chosen chosen = kernel_of(call, group);
    ImitateTable table{};
    int64_t blocks = plan(call, group, chosen.width, table);
    if (call.total) blocks = std::max<int64_t>(blocks, 1);  // entries without any position still have a value, 0
    if (blocks == 0) continue;
    launch("imitate", chosen.kernel, blocks, stream, begin, table, parameters_of(call, group, workspace));
    begin = Begin::after_previous;
  }
}

}  // namespace cuda

int64_t imitate_workspace(const Imitate& call) {
  return cuda::workspace_bytes(call.total ? cuda::imitate_blocks(call) : 0, call.term_count);
}

void imitate(const Imitate& call, void* memory, void* stream) {
  if (call.total) cuda::reset(memory, call.term_count, "imitate", stream);
  cuda::launch_imitate(call, cuda::workspace_at(memory, call.term_count), stream, cuda::Begin::after_previous);
}

}  // namespace frs
