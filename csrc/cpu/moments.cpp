// moments: the sums of the rows in a tile, and their gradients in a second pass (row_losses.h).
//
// Walking planar memory a row's part lies in L1 as a run, and is summed up in lanes. Walking interleaved memory a lane
// is a channel, and the sums of a tile's channels lie in L1. A few numbers are added up in float, then in double: pkd's
// value is what is left of sums that nearly cancel.
#include "isa.h"
#include "rows.h"

namespace frs::FRS_ISA {
namespace {

// What is computed in: vectors of float, or one double.
template <class T>
struct Lanes;
template <>
struct Lanes<double> {
  using V = double;
  static constexpr int64_t WIDTH = 1;
  static FRS_INLINE double get(const double* p) { return *p; }
  static FRS_INLINE double get(const double* p, int64_t) { return *p; }
  static FRS_INLINE void put(double* p, double v) { *p = v; }
  static FRS_INLINE void put(double* p, double v, int64_t) { *p = v; }
  static FRS_INLINE double most(double a, double b) { return a > b ? a : b; }
  struct Wide {
    double at = 0;
    FRS_INLINE void add(double v) { at += v; }
    FRS_INLINE void add_to(double* p) const { *p += at; }
    FRS_INLINE double sum() const { return at; }
  };
  static FRS_INLINE double largest(double v) { return v; }
};
template <>
struct Lanes<float> {
  using V = F32;
  static constexpr int64_t WIDTH = FRS_ISA::WIDTH;
  template <class S>
  static FRS_INLINE F32 get(const S* p) {
    return load_wide(p);
  }
  template <class S>
  static FRS_INLINE F32 get(const S* p, int64_t size) {
    return load_wide(p, size);
  }
  template <class S>
  static FRS_INLINE void put(S* p, F32 v) {
    store_narrow(p, v);
  }
  template <class S>
  static FRS_INLINE void put(S* p, F32 v, int64_t size) {
    store_narrow(p, v, size);
  }
  static FRS_INLINE F32 most(F32 a, F32 b) { return Primitives<F32>::maximum(a, b); }
  struct Wide {
    F64 at[2] = {};
    FRS_INLINE void add(F32 v) { add_wide(at, v); }
    FRS_INLINE void add_to(double* p) const {
      store(p, load<F64>(p) + at[0]);
      store(p + FRS_ISA::WIDTH / 2, load<F64>(p + FRS_ISA::WIDTH / 2) + at[1]);
    }
    FRS_INLINE double sum() const {
      const F64 both = at[0] + at[1];
      double sum = 0;
      for (int lane = 0; lane < FRS_ISA::WIDTH / 2; ++lane) sum += both[lane];
      return sum;
    }
  };
  static FRS_INLINE float largest(F32 v) { return across_lanes(v, Primitives<F32>::maximum); }
};

// f(i, count) for each vector of `size` numbers, the last of which may have fewer: then `count` says how many.
template <class T, class F>
FRS_INLINE void each_vector(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + Lanes<T>::WIDTH <= size; i += Lanes<T>::WIDTH) f(i, std::false_type{});
  if (i < size) f(i, size - i);
}
template <class T, class S>
FRS_INLINE typename Lanes<T>::V get(const S* p, std::false_type) {
  return Lanes<T>::get(p);
}
template <class T, class S>
FRS_INLINE typename Lanes<T>::V get(const S* p, int64_t count) {
  return Lanes<T>::get(p, count);
}
template <class T, class S>
FRS_INLINE void put(S* p, typename Lanes<T>::V v, std::false_type) {
  Lanes<T>::put(p, v);
}
template <class T, class S>
FRS_INLINE void put(S* p, typename Lanes<T>::V v, int64_t count) {
  Lanes<T>::put(p, v, count);
}

// How many numbers a lane adds up in float.
constexpr int FEW = 4;

// What the numbers s and t add to a row's sums, from FIRST on; those before are the pivots, which are maxima.
template <RowLoss LOSS, class V>
struct Step;
template <class V>
struct Step<RowLoss::pkd, V> {
  static constexpr int FIRST = 0;
  V at[NUMBERS] = {};
  template <class T>
  FRS_INLINE void take(V s, V t, V pivot_s, V pivot_t, T) {
    const V d = s - pivot_s, e = t - pivot_t;
    at[0] = at[0] + d, at[1] = at[1] + e;
    at[2] = at[2] + d * d, at[3] = at[3] + e * e, at[4] = at[4] + d * e;
  }
};
template <class V>
struct Step<RowLoss::cwd, V> {
  static constexpr int FIRST = 2;
  V at[NUMBERS] = {};
  template <class T>
  FRS_INLINE void take(V s, V t, V most_s, V most_t, T inverse_temperature) {
    const V d = (most_s - s) * inverse_temperature, e = (most_t - t) * inverse_temperature, q = exp_neg<V>(e);
    at[2] = at[2] + exp_neg<V>(d), at[3] = at[3] + q, at[4] = at[4] + q * (d - e);
  }
};

// Of a run: its pivots are the means of its first numbers, of which one may be far from the others; or its maxima.
template <RowLoss LOSS, class T, class S>
FRS_INLINE Sums sums_of_run(const S* x, const S* z, int64_t size, T inverse_temperature, T (&pivots)[2]) {
  using L = Lanes<T>;
  using V = typename L::V;
  if constexpr (LOSS == RowLoss::pkd) {
    const int64_t few = at_most(L::WIDTH, size);
    for (int which = 0; which < 2; ++which) {
      T sum = 0;  // in T: GCC 12 takes (double)(float)v for v where it vectorises that, and the pivots would be two
      for (int64_t i = 0; i < few; ++i) sum += static_cast<T>(one(which ? z : x, dtype_of<S>, i));
      pivots[which] = sum / static_cast<T>(few);
    }
  } else {
    V most_x = -__builtin_inff() - V{}, most_z = most_x;
    int64_t i = 0;
    for (; i + L::WIDTH <= size; i += L::WIDTH)
      most_x = L::most(most_x, L::get(x + i)), most_z = L::most(most_z, L::get(z + i));
    pivots[0] = L::largest(most_x), pivots[1] = L::largest(most_z);
    for (; i < size; ++i)
      for (int which = 0; which < 2; ++which) {
        const T v = static_cast<T>(one(which ? z : x, dtype_of<S>, i));
        pivots[which] = v > pivots[which] ? v : pivots[which];
      }
  }
  typename L::Wide wide[NUMBERS];
  const V pivot_s = pivots[0] - V{}, pivot_t = pivots[1] - V{};
  int64_t i = 0;
  while (i + L::WIDTH <= size) {
    Step<LOSS, V> step;
    for (const int64_t end = at_most(i + FEW * L::WIDTH, size / L::WIDTH * L::WIDTH); i < end; i += L::WIDTH)
      step.take(L::get(x + i), L::get(z + i), pivot_s, pivot_t, inverse_temperature);
    for (int k = step.FIRST; k < NUMBERS; ++k) wide[k].add(step.at[k]);
  }
  Step<LOSS, double> rest;
  for (; i < size; ++i)
    rest.take(one(x, dtype_of<S>, i), one(z, dtype_of<S>, i), pivots[0], pivots[1], inverse_temperature);
  Sums sums;
  for (int k = 0; k < NUMBERS; ++k) sums.at[k] = wide[k].sum() + rest.at[k];
  if constexpr (LOSS == RowLoss::cwd) sums.at[0] = pivots[0], sums.at[1] = pivots[1];
  return sums;
}

// pkd's sums about the pivots of the whole row, its first numbers.
template <RowLoss LOSS>
FRS_INLINE void settle(const Level& level, int64_t c, double pivot_s, double pivot_t, int64_t count, Sums& sums) {
  if constexpr (LOSS == RowLoss::pkd)
    sums =
        RowTraits<LOSS>::moved(sums, count, pivot_s - one(level.student.data, level.student.dtype, c * level.student.c),
                               pivot_t - one(level.teacher.data, level.teacher.dtype, c * level.teacher.c));
}

template <RowLoss LOSS, class T, class S>
void planar_sums(const Tile& tile, T inverse_temperature, Sums* of_channels) {
  const Level& level = *tile.level;
  Buffer<S> x_buffer, z_buffer;
  each_row(tile, [&](const Row& row) {
    const S* x = fetch(level.student, row, x_buffer);
    const S* z = fetch(level.teacher, row, z_buffer);
    T pivots[2];
    Sums& sums = of_channels[row.c0] = sums_of_run<LOSS, T>(x, z, row.size(), inverse_temperature, pivots);
    settle<LOSS>(level, row.c0, pivots[0], pivots[1], row.size(), sums);
  });
}

template <RowLoss LOSS, class T, class S>
void interleaved_sums(const Tile& tile, T inverse_temperature, Sums* of_channels) {
  using L = Lanes<T>;
  Buffer<S> x_buffer, z_buffer;
  Buffer<T> pivots[2];
  Buffer<double> sums[NUMBERS];
  for (auto& of : sums)
    for (double& v : of.values) v = 0;
  for (auto& of : pivots)
    for (T& v : of.values) v = -__builtin_inff();
  const auto each = [&](const auto& f) {
    each_row(tile, [&](const Row& row) {
      const S* x = fetch(tile.level->student, row, x_buffer);
      const S* z = fetch(tile.level->teacher, row, z_buffer);
      each_vector<T>(row.c1 - row.c0, [&](int64_t i, auto count) { f(row, x + i, z + i, i, count); });
    });
  };
  if constexpr (LOSS == RowLoss::cwd)
    each([&](const Row& row, const S* x, const S* z, int64_t i, auto count) {
      auto most_s = L::get(pivots[0].values + i), most_t = L::get(pivots[1].values + i);
      for (int64_t p = row.p0; p < row.p1; ++p, x += row.c1 - row.c0, z += row.c1 - row.c0)
        most_s = L::most(most_s, get<T>(x, count)), most_t = L::most(most_t, get<T>(z, count));
      L::put(pivots[0].values + i, most_s), L::put(pivots[1].values + i, most_t);
    });
  each([&](const Row& row, const S* x, const S* z, int64_t i, auto count) {
    if (LOSS == RowLoss::pkd && row.p0 == tile.p0)
      L::put(pivots[0].values + i, get<T>(x, count)), L::put(pivots[1].values + i, get<T>(z, count));
    const auto pivot_s = L::get(pivots[0].values + i), pivot_t = L::get(pivots[1].values + i);
    for (int64_t p = row.p0; p < row.p1;) {
      Step<LOSS, typename L::V> step;
      for (const int64_t end = at_most(p + FEW, row.p1); p < end; ++p, x += row.c1 - row.c0, z += row.c1 - row.c0)
        step.take(get<T>(x, count), get<T>(z, count), pivot_s, pivot_t, inverse_temperature);
      for (int k = step.FIRST; k < NUMBERS; ++k) {
        typename L::Wide wide;
        wide.add(step.at[k]);
        wide.add_to(sums[k].values + i);
      }
    }
  });
  for (int64_t i = 0; i < tile.c1 - tile.c0; ++i) {
    Sums& of = of_channels[tile.c0 + i];
    for (int k = 0; k < NUMBERS; ++k) of.at[k] = k < Step<LOSS, T>::FIRST ? pivots[k].values[i] : sums[k].values[i];
    settle<LOSS>(*tile.level, tile.c0 + i, pivots[0].values[i], pivots[1].values[i], tile.p1 - tile.p0, of);
  }
}

template <RowLoss LOSS, class T, class S>
void sums_of_tile(const Moments& call, const Tile& tile, Sums* of_channels) {
  const T inverse_temperature = static_cast<T>(1 / call.temperature);
  if (tile.level->interleaved)
    interleaved_sums<LOSS, T, S>(tile, inverse_temperature, of_channels);
  else
    planar_sums<LOSS, T, S>(tile, inverse_temperature, of_channels);
}

// The gradients of some numbers: those of one row, whose numbers are one each, or SPREAD of a channel each, whose
// numbers lie side by side.
template <RowLoss LOSS, bool SPREAD, class T, class S>
FRS_INLINE void align_run(const S* x, const S* z, S* grad, int64_t size, const T* const (&numbers)[NUMBERS],
                          T inverse_temperature, bool past_caches) {
  using L = Lanes<T>;
  using V = typename L::V;
  const auto at = [&](int64_t i, auto count) {
    V of[NUMBERS];
    for (int k = 0; k < NUMBERS; ++k) of[k] = SPREAD ? L::get(numbers[k] + i) : *numbers[k] - V{};
    return RowTraits<LOSS>::slope(get<T>(x + i, count), get<T>(z + i, count), of[0], of[1], of[2], of[3], of[4],
                                  inverse_temperature);
  };
  int64_t i = 0;
  if constexpr (L::WIDTH > 1) {
    if (past_caches) {
      const int64_t before = -(reinterpret_cast<intptr_t>(grad) / static_cast<intptr_t>(sizeof(S))) & (L::WIDTH - 1);
      i = at_most(before, size);
      if (i) L::put(grad, at(0, i), i);
      for (; i + L::WIDTH <= size; i += L::WIDTH) stream(grad + i, Stored<S>::narrow(at(i, std::false_type{})));
    }
  }
  for (; i + L::WIDTH <= size; i += L::WIDTH) L::put(grad + i, at(i, std::false_type{}));
  if (i < size) L::put(grad + i, at(i, size - i), size - i);
}

template <RowLoss LOSS, class T, class S>
void align(const MomentsBackward& call, const Tile& tile, double upstream) {
  const Level& level = *tile.level;
  const T inverse_temperature = static_cast<T>(1 / call.temperature), factor = static_cast<T>(upstream);
  const bool past_caches = streams<S>(level);
  const int64_t first = level.first + (RowTraits<LOSS>::per_image ? tile.n * level.c : 0) + tile.c0;
  const T* rows = static_cast<const T*>(call.rows) + first * NUMBERS;
  Buffer<S> x_buffer, z_buffer, grad_buffer;
  Buffer<T> of_channels[NUMBERS];
  for (int64_t c = 0; c < tile.c1 - tile.c0; ++c)
    for (int k = 0; k < NUMBERS; ++k) of_channels[k].values[c] = rows[c * NUMBERS + k] * (k < 2 ? T(1) : factor);
  each_row(tile, [&](const Row& row) {
    const S* x = fetch(level.student, row, x_buffer);
    const S* z = fetch(level.teacher, row, z_buffer);
    S* const to = target(level.grad, row, grad_buffer);
    const bool direct = past_caches && to != grad_buffer.values;
    const T* numbers[NUMBERS];
    for (int k = 0; k < NUMBERS; ++k) numbers[k] = of_channels[k].values + (row.c0 - tile.c0);
    if (!level.interleaved) {
      align_run<LOSS, false>(x, z, to, row.size(), numbers, inverse_temperature, direct);
    } else {
      const int64_t channels = row.c1 - row.c0;
      S* grad = to;
      for (int64_t p = row.p0; p < row.p1; ++p, x += channels, z += channels, grad += channels)
        align_run<LOSS, true>(x, z, grad, channels, numbers, inverse_temperature, direct);
    }
    commit(level.grad, row, grad_buffer, to);
  });
  if (past_caches) fence();
}

// F is given the types that a tile is computed in and from.
template <class F>
void with_types(DType dtype, const Level& level, const F& f) {
  const DType s = level.student.dtype, t = level.teacher.dtype;
  if (dtype == DType::f64) return f(double{}, double{});
  if (s == DType::bf16 && t == s) return f(float{}, Bf16{});
  if (s == DType::f16 && t == s) return f(float{}, F16{});
  f(float{}, float{});
}

}  // namespace

void moments_tile(const Moments& call, const Tile& tile, Sums* of_channels) {
  with_types(call.dtype, *tile.level, [&](auto t, auto s) {
    with_row_loss(call.loss, [&](auto loss) {
      sums_of_tile<decltype(loss)::value, decltype(t), decltype(s)>(call, tile, of_channels);
    });
  });
}

void align_tile(const MomentsBackward& call, const Tile& tile, double upstream) {
  with_types(call.dtype, *tile.level, [&](auto t, auto s) {
    with_row_loss(call.loss,
                  [&](auto loss) { align<decltype(loss)::value, decltype(t), decltype(s)>(call, tile, upstream); });
  });
}

}  // namespace frs::FRS_ISA
