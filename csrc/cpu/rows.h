// Rows of a tile as runs in L1: the tensor's own memory where it is one, else a buffer.
//
// S is what a tile is computed from: double, float, or the 16-bit dtype that all its tensors share. Where they differ
// it is float, and the others are widened into the buffer.
#pragma once

#include "tiles.h"
#include "vec.h"

namespace frs::FRS_ISA {

// What is not inlined is static, or the linker could keep another set's copy of it.

// Part of a tile, at most ROW values: positions of one channel (planar) or channels of some positions (interleaved).
struct Row {
  const Tile* tile;
  int64_t c0, c1, p0, p1;

  FRS_INLINE int64_t size() const { return (c1 - c0) * (p1 - p0); }
};

// Call f with each row of the tile.
template <class F>
static FRS_INLINE void each_row(const Tile& tile, const F& f) {
  if (!tile.level->interleaved) {
    for (int64_t c = tile.c0; c < tile.c1; ++c) f(Row{&tile, c, c + 1, tile.p0, tile.p1});
  } else {
    const int64_t channels = tile.c1 - tile.c0;
    const int64_t step_c = at_most(channels, ROW), step_p = at_least_1(ROW / channels);
    for (int64_t p = tile.p0; p < tile.p1; p += step_p)
      for (int64_t c = tile.c0; c < tile.c1; c += step_c)
        f(Row{&tile, c, at_most(c + step_c, tile.c1), p, at_most(p + step_p, tile.p1)});
  }
}

FRS_INLINE int64_t offset(const View& v, const Row& row, int64_t c, int64_t p) {
  const int64_t width = row.tile->level->w;
  const int64_t position = v.p >= 0 ? p * v.p : p / width * v.h + p % width * v.w;
  return row.tile->n * v.n + c * v.c + position;
}

// Whether the row's values lie one after another in memory, in the order of the row.
FRS_INLINE bool is_run(const View& v, const Row& row) {
  if (!row.tile->level->interleaved) return v.p == 1;
  return v.c == 1 && (row.p1 - row.p0 == 1 || v.p == row.c1 - row.c0);
}

template <class S>
constexpr DType dtype_of = sizeof(S) == 8 ? DType::f64 : DType::f32;
template <>
constexpr DType dtype_of<Bf16> = DType::bf16;
template <>
constexpr DType dtype_of<F16> = DType::f16;

FRS_INLINE const char* address(const View& v, int64_t at) {
  const int64_t bytes = v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
  return static_cast<const char*>(v.data) + at * bytes;
}

template <class S>
static FRS_INLINE void widen_values(float* out, const S* in, int64_t size) {
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) store(out + i, load_wide(in + i));
  if (i < size) store(out + i, load_wide(in + i, size - i));  // buffers have room for a whole vector more
}
template <class S>
static FRS_INLINE void narrow_values(S* out, const float* in, int64_t size) {
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) store_narrow(out + i, load<F32>(in + i));
  if (i < size) store_narrow(out + i, load<F32>(in + i), size - i);
}

// A run of any dtype into a buffer of double or float, or one of 16 bits into a buffer of the same; and back.
template <class S>
static inline void widen_run(S* out, const void* in, DType, int64_t size) {
  memcpy(out, in, size * sizeof(S));
}
static inline void widen_run(double* out, const void* in, DType dtype, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = one(in, dtype, i);
}
static inline void widen_run(float* out, const void* in, DType dtype, int64_t size) {
  switch (dtype) {
    case DType::bf16: return widen_values(out, static_cast<const Bf16*>(in), size);
    case DType::f16: return widen_values(out, static_cast<const F16*>(in), size);
    default:
      for (int64_t i = 0; i < size; ++i) out[i] = static_cast<float>(one(in, dtype, i));
  }
}
template <class S>
static inline void narrow_run(void* out, DType, const S* in, int64_t size) {
  memcpy(out, in, size * sizeof(S));
}
static inline void narrow_run(void* out, DType dtype, const double* in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) put(out, dtype, i, in[i]);
}
static inline void narrow_run(void* out, DType dtype, const float* in, int64_t size) {
  switch (dtype) {
    case DType::bf16: return narrow_values(static_cast<Bf16*>(out), in, size);
    case DType::f16: return narrow_values(static_cast<F16*>(out), in, size);
    default:
      for (int64_t i = 0; i < size; ++i) put(out, dtype, i, in[i]);
  }
}

template <class S>
struct Buffer {
  alignas(64) S values[ROW + 16];
};

// Have what lies `ahead` values further fetched, which may be no part of the tensor.
template <class S>
FRS_INLINE void prefetch(const S* p, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + ahead * sizeof(S)));
}

// Call f(from, step, to, count) for each part of the row whose values lie `step` apart in memory: from element `from`,
// the row's values number `to` to `to + count`.
template <class F>
static FRS_INLINE void each_span(const View& v, const Row& row, const F& f) {
  if (row.tile->level->interleaved) {
    const int64_t channels = row.c1 - row.c0;
    for (int64_t p = row.p0; p < row.p1; ++p) f(offset(v, row, row.c0, p), v.c, (p - row.p0) * channels, channels);
  } else if (v.p >= 0) {
    f(offset(v, row, row.c0, row.p0), v.p, 0, row.size());
  } else {
    const int64_t width = row.tile->level->w;
    for (int64_t p = row.p0, end; p < row.p1; p = end) {
      end = at_most((p / width + 1) * width, row.p1);
      f(offset(v, row, row.c0, p), v.w, p - row.p0, end - p);
    }
  }
}

// The values of a row: in place, or widened or gathered into the buffer.
template <class S>
static FRS_INLINE const S* fetch(const View& v, const Row& row, Buffer<S>& buffer) {
  if (is_run(v, row)) {
    const char* p = address(v, offset(v, row, row.c0, row.p0));
    if (v.dtype == dtype_of<S>) return reinterpret_cast<const S*>(p);
    widen_run(buffer.values, p, v.dtype, row.size());
  } else {
    each_span(v, row, [&](int64_t from, int64_t step, int64_t to, int64_t count) {
      const char* p = address(v, from);
      if (step == 1) return widen_run(buffer.values + to, p, v.dtype, count);
      for (int64_t i = 0; i < count; ++i) buffer.values[to + i] = item<S>(p, v.dtype, i * step);
    });
  }
  return buffer.values;
}

// Where a row's values are to be computed: in place where `commit` would have nothing to do, else in the buffer.
template <class S>
FRS_INLINE S* target(const View& v, const Row& row, Buffer<S>& buffer) {
  if (!v.data) return nullptr;
  const bool direct = is_run(v, row) && v.dtype == dtype_of<S>;
  return direct ? reinterpret_cast<S*>(const_cast<char*>(address(v, offset(v, row, row.c0, row.p0)))) : buffer.values;
}

// A gradient that no cache holds until it is read again goes past them, which saves reading each line before it is
// written (docs/design-notes.md).
template <class S>
FRS_INLINE bool streams(const Level& level) {
  return level.n * level.c * level.positions() * static_cast<int64_t>(sizeof(S)) > (4 << 20);
}

template <class S>
static FRS_INLINE void commit(const View& v, const Row& row, const Buffer<S>& buffer, const S* computed) {
  if (computed != buffer.values) return;
  if (is_run(v, row)) {
    narrow_run(const_cast<char*>(address(v, offset(v, row, row.c0, row.p0))), v.dtype, buffer.values, row.size());
  } else {
    each_span(v, row, [&](int64_t from, int64_t step, int64_t to, int64_t count) {
      char* p = const_cast<char*>(address(v, from));
      if (step == 1) return narrow_run(p, v.dtype, buffer.values + to, count);
      for (int64_t i = 0; i < count; ++i) put(p, v.dtype, i * step, buffer.values[to + i]);
    });
  }
}

}  // namespace frs::FRS_ISA
