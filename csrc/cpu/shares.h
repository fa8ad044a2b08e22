// The shares of a tile's positions, and how its gradients are written.
#pragma once

#include "tiles.h"

namespace frs::FRS_ISA {

// What is not inlined is static, or the linker could keep another set's copy of it.

template <class T, class S>
static inline void share_run(T* share, const S* scores, S norm, const Entry& entry, int64_t size) {
  const S denominator = norm + static_cast<S>(entry.eps);
  const T scale = static_cast<T>(entry.scale);
  for (int64_t i = 0; i < size; ++i)
    share[i] = denominator == 0 ? T(0) : static_cast<T>(scores[i] / denominator) * scale;
}

template <class S>
static inline S norm_of(const Imitate& call, const Entry& entry) {
  const S* norm = static_cast<const S*>(call.norm);
  if (call.joint == 0) return norm[entry.level];
  S sum = 0;
  for (int64_t l = 0; l < call.joint; ++l) sum += norm[l];
  return sum;
}

// The shares and coefficients of the positions [p0, p1) of a tile.
template <class T>
static inline void weigh(const Imitate& call, const Tile& tile, int64_t p0, int64_t p1, T upstream, T* share,
                         T* coefficient) {
  const Entry& entry = call.entries[tile.index];
  const int64_t first = entry.first + tile.n * entry.positions() + p0, size = p1 - p0;
  if (call.score_dtype == DType::f64)
    share_run(share, static_cast<const double*>(call.scores) + first, norm_of<double>(call, entry), entry, size);
  else
    share_run(share, static_cast<const float*>(call.scores) + first, norm_of<float>(call, entry), entry, size);
  for (int64_t i = 0; i < size; ++i) coefficient[i] = upstream * share[i];
}

}  // namespace frs::FRS_ISA
