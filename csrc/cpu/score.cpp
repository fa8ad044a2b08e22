// score: S_p = max_k sigmoid(z_pk) = sigmoid(max_k z_pk), and the sum of a tile's scores. A NaN comes through the
// maximum.
#include "isa.h"
#include "rows.h"

namespace frs::FRS_ISA {
namespace {

template <class T>
FRS_INLINE T larger(T best, T z) {
  return z > best || z != z ? z : best;
}

// best[i] = max(best[i], z[i]). A vector's maximum forgets a NaN; the sum beside it does not. `ahead` is fetched early:
// the hardware's prefetch stops where a row ends.
inline void keep_larger(double* best, double*, const double* z, int64_t size, int64_t) {
  for (int64_t i = 0; i < size; ++i) best[i] = larger(best[i], z[i]);
}
template <class S>
inline void keep_larger(float* best, float* sum, const S* z, int64_t size, int64_t ahead) {
  for (int64_t i = 0; i < size; i += WIDTH) {
    prefetch(z + i, ahead);
    const F32 v = i + WIDTH <= size ? load_wide(z + i) : load_wide(z + i, size - i);
    store(best + i, Primitives<F32>::maximum(load<F32>(best + i), v));
    store(sum + i, load<F32>(sum + i) + v);
  }
}

template <class T, class S>
inline T largest_one_by_one(const S* z, int64_t size) {
  T best = -__builtin_inf();
  for (int64_t i = 0; i < size; ++i) best = larger(best, static_cast<T>(one(z, dtype_of<S>, i)));
  return best;
}
inline double largest(const double* z, int64_t size) { return largest_one_by_one<double>(z, size); }
template <class S>
inline float largest(const S* z, int64_t size) {
  if (size < WIDTH) return largest_one_by_one<float>(z, size);
  F32 best = load_wide(z), sum = best;
  const auto take = [&](F32 v) {
    best = Primitives<F32>::maximum(best, v);
    sum = sum + v;
  };
  int64_t i = WIDTH;
  for (; i + WIDTH <= size; i += WIDTH) {
    prefetch(z + i, ROW);
    take(load_wide(z + i));
  }
  if (i < size) take(load_wide(z + size - WIDTH));  // some once more: a maximum does not mind
  // All once more, slowly, where there was a NaN, or both infinities.
  const float total = across_lanes(sum, [](F32 a, F32 b) { return a + b; });
  return total == total ? across_lanes(best, Primitives<F32>::maximum) : largest_one_by_one<float>(z, size);
}

inline void sigmoid_run(double* v, int64_t size) {
  for (int64_t i = 0; i < size; ++i) v[i] = sigmoid(v[i]);
}
inline void sigmoid_run(float* v, int64_t size) {
  for (int64_t i = 0; i < size; i += WIDTH) store(v + i, sigmoid(load<F32>(v + i)));
}

// The maximum over the channels of one position, wherever they lie.
template <class T>
T largest_of(const Tile& tile, int64_t p) {
  const View& z = tile.level->teacher;
  const Row row{&tile, 0, 1, p, p + 1};
  T best = -__builtin_inf();
  for (int64_t c = 0; c < tile.level->c; ++c)
    best = larger(best, static_cast<T>(one(z.data, z.dtype, offset(z, row, c, p))));
  return best;
}

// At most ROW positions, whose scores are made in L1.
template <class T, class S>
double score_positions(const Score& call, const Tile& tile) {
  Buffer<T> top, sums;
  Buffer<S> row_buffer;
  const bool interleaved = tile.level->interleaved;
  const int64_t size = tile.p1 - tile.p0;
  for (int64_t i = 0; i < ROW + 16; ++i) {
    top.values[i] = -__builtin_inf();
    sums.values[i] = 0;
  }
  each_row(tile, [&](const Row& row) {
    const S* z = fetch(tile.level->teacher, row, row_buffer);
    if (!interleaved) {
      keep_larger(top.values, sums.values, z, row.size(), z == row_buffer.values ? 0 : 2 * tile.level->teacher.c);
    } else {
      const int64_t channels = row.c1 - row.c0;
      for (int64_t p = row.p0; p < row.p1; ++p, z += channels) {
        T& best = top.values[p - tile.p0];
        best = larger(best, largest(z, channels));
      }
    }
  });
  for (int64_t i = 0; i < size; ++i)
    if (sums.values[i] != sums.values[i]) top.values[i] = largest_of<T>(tile, tile.p0 + i);
  sigmoid_run(top.values, size);
  T* scores = static_cast<T*>(call.scores) + tile.level->first + tile.n * tile.level->positions() + tile.p0;
  // In eight chains: one of 1,024 additions would alone round as much as all the rest in fp64.
  double chains[8] = {};
  for (int64_t i = 0; i < size; ++i) {
    scores[i] = top.values[i];
    chains[i % 8] += top.values[i];
  }
  return ((chains[0] + chains[1]) + (chains[2] + chains[3])) + ((chains[4] + chains[5]) + (chains[6] + chains[7]));
}

template <class T, class S>
double score_tile(const Score& call, const Tile& tile) {
  double sum = 0;
  for (Tile part = tile; part.p0 < tile.p1; part.p0 += ROW) {
    part.p1 = at_most(part.p0 + ROW, tile.p1);
    sum += score_positions<T, S>(call, part);
  }
  return sum;
}

}  // namespace

double score_tile(const Score& call, const Tile& tile) {
  if (call.dtype == DType::f64) return score_tile<double, double>(call, tile);
  switch (tile.level->teacher.dtype) {
    case DType::bf16: return score_tile<float, Bf16>(call, tile);
    case DType::f16: return score_tile<float, F16>(call, tile);
    default: return score_tile<float, float>(call, tile);
  }
}

}  // namespace frs::FRS_ISA
