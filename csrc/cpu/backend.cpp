// The verbs on a CPU: tiles shared out among torch's own threads, their sums in fixed slots, added in a fixed order.
#include <torch/csrc/stable/ops.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"

namespace frs {
namespace {

struct Kernels {
  const char* name;
  decltype(&baseline::score_tile) score_tile;
  decltype(&baseline::imitate_tile) imitate_tile;
  decltype(&baseline::softmax_tile) softmax_tile;
  decltype(&baseline::scale_run) scale_run;
  decltype(&baseline::moments_tile) moments_tile;
  decltype(&baseline::align_tile) align_tile;
  decltype(&baseline::number) number;
};

#define FRS_KERNELS_OF(ISA)                                                                                          \
  Kernels {                                                                                                          \
    #ISA, ISA::score_tile, ISA::imitate_tile, ISA::softmax_tile, ISA::scale_run, ISA::moments_tile, ISA::align_tile, \
        ISA::number                                                                                                  \
  }

// The widest set of instructions that this CPU has; FRS_CPU=baseline|avx2|avx512 asks for one no wider.
Kernels choose() {
  const char* asked = std::getenv("FRS_CPU");
  const std::string most = asked && *asked ? asked : "avx512";
  if (most != "baseline" && most != "avx2" && most != "avx512")
    throw std::runtime_error("FRS_CPU='" + most + "' is unknown; the valid ones are baseline, avx2, avx512");
#if defined(__x86_64__)
  if (most == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return FRS_KERNELS_OF(avx512);
  if (most != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return FRS_KERNELS_OF(avx2);
#endif
  return FRS_KERNELS_OF(baseline);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

// The tiles of all levels, numbered level after level.
template <class L, Cut (*CUT)(const L&)>
class Tiles {
 public:
  Tiles(const L* levels, int64_t count) : levels_(levels), starts_{0} {
    for (int64_t i = 0; i < count; ++i) {
      cuts_.push_back(CUT(levels[i]));
      starts_.push_back(starts_.back() + cuts_[i].tiles(levels[i]));
    }
  }
  int64_t count() const { return starts_.back(); }

  int64_t values() const {
    int64_t sum = 0;
    for (size_t i = 0; i < cuts_.size(); ++i) sum += levels_[i].n * levels_[i].c * levels_[i].positions();
    return sum;
  }

  Tile operator[](int64_t number) const {
    size_t level = 0;
    while (number >= starts_[level + 1]) ++level;
    return tile_of(levels_[level], cuts_[level], static_cast<int64_t>(level), number - starts_[level]);
  }

  const Cut& cut(int64_t level) const { return cuts_[level]; }

  double sum(const double* slots, int64_t level) const {
    double sum = 0;
    for (int64_t i = starts_[level]; i < starts_[level + 1]; ++i) sum += slots[i];
    return sum;
  }

 private:
  const L* levels_;
  std::vector<Cut> cuts_;
  std::vector<int64_t> starts_;
};

using ScoreTiles = Tiles<Level, score_cut>;
using ImitateTiles = Tiles<Entry, imitate_cut>;
using MomentsTiles = Tiles<Level, moments_cut>;

// Run f(i) for i < count, together about `values` values. A thread takes the next as soon as it is done with one: the
// levels' tiles differ in cost. What is less than two tiles' work is done here: waking another thread takes longer.
template <class F>
void share_out(int64_t count, int64_t values, const F& f) {
  if (values < 2 * TILE) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

struct alignas(64) Line {
  char bytes[64];
};

void write(void* numbers, DType dtype, int64_t at, double value) {
  if (dtype == DType::f64)
    static_cast<double*>(numbers)[at] = value;
  else
    static_cast<float*>(numbers)[at] = static_cast<float>(value);
}

// The sums of the rows' parts: a part is a channel in the positions of one tile. Behind them a value a row.
class Parts {
 public:
  Parts(const Moments& call, const MomentsTiles& tiles) : call_(call), starts_{0} {
    with_row_loss(call.loss, [&](auto loss) { per_image_ = RowTraits<decltype(loss)::value>::per_image; });
    for (int64_t l = 0; l < call.count; ++l) {
      blocks_.push_back(tiles.cut(l).blocks);
      starts_.push_back(starts_[l] + call.levels[l].n * blocks_[l] * call.levels[l].c);
      rows_.push_back((l ? rows_[l - 1] : 0) + rows_of(call.levels[l]));
    }
  }
  int64_t count() const { return starts_.back(); }
  int64_t rows() const { return rows_.back(); }
  int64_t rows_of(const Level& level) const { return (per_image_ ? level.n : 1) * level.c; }

  // Where a tile's part of channel 0 is; those of the next channels are next to it.
  Sums* of(Sums* parts, const Tile& tile, const Cut& cut) const {
    const Level& level = *tile.level;
    return parts + starts_[tile.index] + (tile.n * blocks_[tile.index] + tile.p0 / cut.length) * level.c;
  }

  // Adds up a row's parts, in one order, and writes its numbers; its value.
  double finish(const Sums* parts, int64_t row, const Kernels& with) const {
    int64_t l = 0;
    while (row >= rows_[l]) ++l;
    const Level& level = call_.levels[l];
    const int64_t within = row - (l ? rows_[l - 1] : 0), c = within % level.c, first = within / level.c;
    const int64_t images = per_image_ ? 1 : level.n, blocks = images * blocks_[l];
    const Sums* part = parts + starts_[l] + first * blocks_[l] * level.c + c;
    RowOf of{static_cast<double>(images * level.positions()),
             static_cast<double>(rows_of(level)),
             call_.scale[l],
             call_.temperature,
             call_.eps,
             0,
             0};
    double value = 0;
    with_row_loss(call_.loss, [&](auto loss) {
      using Of = RowTraits<decltype(loss)::value>;
      Sums sums = Of::none();
      if (blocks > 0 && !per_image_) {
        of.pivot_s = with.number(pivot(level.student, c), level.student.dtype);
        of.pivot_t = with.number(pivot(level.teacher, c), level.teacher.dtype);
      }
      for (int64_t i = 0; i < blocks; ++i) Of::add(sums, part[i * level.c], call_.temperature);
      if (call_.dtype == DType::f64)
        value = Of::finish(sums, of, static_cast<double*>(call_.rows) + row * NUMBERS);
      else
        value = Of::finish(sums, of, static_cast<float*>(call_.rows) + row * NUMBERS);
    });
    return value;
  }

 private:
  static const void* pivot(const View& view, int64_t c) {
    const int64_t bytes = view.dtype == DType::f64 ? 8 : view.dtype == DType::f32 ? 4 : 2;
    return static_cast<const char*>(view.data) + c * view.c * bytes;
  }

  const Moments& call_;
  bool per_image_ = false;
  std::vector<int64_t> blocks_, starts_, rows_;
};

double upstream_of(double weight, const void* factor, DType dtype) {
  return weight * (factor ? kernels().number(factor, dtype) : 1.0);
}

}  // namespace

const char* instructions() { return kernels().name; }

// Fresh memory comes from the system page by page, each zeroed at its first touch: 4 KB at a time that takes longer
// than computing what is written there. In pages of 2 MB it does not. A hint: where it is refused, nothing is lost.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) & ~(PAGE - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(PAGE - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

int64_t score_workspace(const Score& call) { return 8 * ScoreTiles(call.levels, call.count).count(); }

void score(const Score& call, void* workspace, void*) {
  const ScoreTiles tiles(call.levels, call.count);
  auto* slots = static_cast<double*>(workspace);
  const Kernels& with = kernels();
  share_out(tiles.count(), tiles.values(), [&](int64_t i) { slots[i] = with.score_tile(call, tiles[i]); });
  for (int64_t l = 0; l < call.count; ++l) write(call.mass, call.dtype, l, tiles.sum(slots, l));
}

int64_t imitate_workspace(const Imitate& call) {
  return call.total ? 8 * ImitateTiles(call.entries, call.count).count() : 0;
}

void imitate(const Imitate& call, void* workspace, void*) {
  const ImitateTiles tiles(call.entries, call.count);
  auto* slots = static_cast<double*>(workspace);
  const Kernels& with = kernels();
  std::vector<double> upstream;
  for (const Term* term = call.terms; term < call.terms + call.term_count; ++term)
    upstream.push_back(upstream_of(term->weight, term->factor, term->factor_dtype));
  share_out(tiles.count(), tiles.values(), [&](int64_t i) {
    const Tile tile = tiles[i];
    const Entry& entry = call.entries[tile.index];
    if (!call.total && !entry.grad.data) return;
    double sum;
    if (entry.group) {
      const std::unique_ptr<Line[]> scratch(new Line[up(softmax_scratch(entry), sizeof(Line))]);
      sum = with.softmax_tile(call, tile, upstream[entry.term], scratch.get());
    } else {
      sum = with.imitate_tile(call, tile, upstream[entry.term]);
    }
    if (call.total) slots[i] = sum;
  });
  if (!call.total) return;
  std::vector<double> values(call.term_count);
  for (int64_t e = 0; e < call.count; ++e) {
    const double sum = tiles.sum(slots, e);
    write(call.values, call.dtype, call.term_count + e, sum);
    values[call.entries[e].term] += sum;
  }
  double total = 0;
  for (int64_t t = 0; t < call.term_count; ++t) {
    write(call.values, call.dtype, t, values[t]);
    total += upstream[t] * values[t];
  }
  write(call.total, call.dtype, 0, total);
}

int64_t distill_workspace(const Score& score, const Imitate& imitate) {
  return std::max(score_workspace(score), imitate_workspace(imitate));
}

void distill(const Score& first, const Imitate& then, void* workspace, void* stream) {
  score(first, workspace, stream);
  imitate(then, workspace, stream);
}

void scale(const Scale& call, void*) {
  const Kernels& with = kernels();
  const double factor = with.number(call.factor, call.factor_dtype);
  if (factor == 1) return;
  constexpr int64_t PIECE = 4 * TILE;
  for (int64_t i = 0; i < call.count; ++i) {
    const Run& run = call.runs[i];
    share_out(up(run.size, PIECE), run.size, [&](int64_t piece) {
      with.scale_run(run, piece * PIECE, at_most((piece + 1) * PIECE, run.size), factor);
    });
  }
}

int64_t moments_workspace(const Moments& call) {
  const MomentsTiles tiles(call.levels, call.count);
  const Parts parts(call, tiles);
  return parts.count() * static_cast<int64_t>(sizeof(Sums)) + 8 * parts.rows();
}

void moments(const Moments& call, void* workspace, void*) {
  const MomentsTiles tiles(call.levels, call.count);
  const Parts parts(call, tiles);
  const Kernels& with = kernels();
  auto* sums = static_cast<Sums*>(workspace);
  auto* of_rows = reinterpret_cast<double*>(sums + parts.count());
  share_out(tiles.count(), 2 * tiles.values(), [&](int64_t i) {
    const Tile tile = tiles[i];
    with.moments_tile(call, tile, parts.of(sums, tile, tiles.cut(tile.index)));
  });
  share_out(up(parts.rows(), 64), 64 * parts.count(), [&](int64_t piece) {
    for (int64_t row = 64 * piece; row < at_most(64 * piece + 64, parts.rows()); ++row)
      of_rows[row] = parts.finish(sums, row, with);
  });
  double value = 0;
  for (int64_t l = 0, row = 0; l < call.count; ++l) {
    double of_level = 0;
    for (const int64_t end = row + parts.rows_of(call.levels[l]); row < end; ++row) of_level += of_rows[row];
    write(call.values, call.dtype, 1 + l, of_level);
    value += of_level;
  }
  write(call.values, call.dtype, 0, value);
  write(call.total, call.dtype, 0, upstream_of(call.weight, call.factor, call.factor_dtype) * value);
}

void moments_backward(const MomentsBackward& call, void*) {
  const MomentsTiles tiles(call.levels, call.count);
  const Kernels& with = kernels();
  const double upstream = upstream_of(call.weight, call.factor, call.factor_dtype);
  share_out(tiles.count(), 2 * tiles.values(), [&](int64_t i) { with.align_tile(call, tiles[i], upstream); });
}

}  // namespace frs
