// Rows of a tile as runs of float or double, in L1: the tensor's own memory where it is such a run, else a buffer.
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

template <class T>
constexpr DType dtype_of = sizeof(T) == 8 ? DType::f64 : DType::f32;

FRS_INLINE const char* address(const View& v, int64_t at) {
  const int64_t bytes = v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
  return static_cast<const char*>(v.data) + at * bytes;
}

// The end of a run that fills no vector: its `size` values, then zeros.
template <class V, class T>
FRS_INLINE V load_part(const T* p, int64_t size) {
  V v = {};
  memcpy(&v, p, size * sizeof(T));
  return v;
}

template <class T>
static inline void widen_run(T* out, const void* in, DType dtype, int64_t size) {
  if (dtype == DType::f32 || dtype == DType::f64 || sizeof(T) == 8) {
    for (int64_t i = 0; i < size; ++i) out[i] = one(in, dtype, i);
    return;
  }
  const auto* from = static_cast<const uint16_t*>(in);
  const bool bf16 = dtype == DType::bf16;
  for (int64_t i = 0; i < size; i += WIDTH) {
    const U16 v = i + WIDTH <= size ? load<U16>(from + i) : load_part<U16>(from + i, size - i);
    store(out + i, bf16 ? bf16_to_f32(v) : f16_to_f32(v));  // buffers have room for a whole vector more
  }
}

template <class T>
static inline void narrow_run(void* out, DType dtype, const T* in, int64_t size) {
  if (dtype == DType::f32 || dtype == DType::f64 || sizeof(T) == 8) {
    for (int64_t i = 0; i < size; ++i) put(out, dtype, i, in[i]);
    return;
  }
  auto* to = static_cast<uint16_t*>(out);
  const bool bf16 = dtype == DType::bf16;
  for (int64_t i = 0; i < size; i += WIDTH) {
    const F32 v = load<F32>(in + i);
    const U16 narrow = bf16 ? f32_to_bf16(v) : f32_to_f16(v);
    if (i + WIDTH <= size)
      store(to + i, narrow);
    else
      memcpy(to + i, &narrow, (size - i) * 2);
  }
}

template <class T>
struct Buffer {
  alignas(64) T values[ROW + 16];
};

// Have what lies `ahead` values further fetched, which may be no part of the tensor.
template <class T>
FRS_INLINE void prefetch(const T* p, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + ahead * sizeof(T)));
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
template <class T>
static FRS_INLINE const T* fetch(const View& v, const Row& row, Buffer<T>& buffer) {
  if (is_run(v, row)) {
    const char* p = address(v, offset(v, row, row.c0, row.p0));
    if (v.dtype == dtype_of<T>) return reinterpret_cast<const T*>(p);
    widen_run(buffer.values, p, v.dtype, row.size());
  } else {
    each_span(v, row, [&](int64_t from, int64_t step, int64_t to, int64_t count) {
      const char* p = address(v, from);
      if (step == 1) return widen_run(buffer.values + to, p, v.dtype, count);
      for (int64_t i = 0; i < count; ++i) buffer.values[to + i] = one(p, v.dtype, i * step);
    });
  }
  return buffer.values;
}

// Where a row's values are to be computed: in place where `commit` would have nothing to do, else in the buffer.
template <class T>
FRS_INLINE T* target(const View& v, const Row& row, Buffer<T>& buffer) {
  if (!v.data) return nullptr;
  const bool direct = is_run(v, row) && v.dtype == dtype_of<T>;
  return direct ? reinterpret_cast<T*>(const_cast<char*>(address(v, offset(v, row, row.c0, row.p0)))) : buffer.values;
}

template <class T>
static FRS_INLINE void commit(const View& v, const Row& row, const Buffer<T>& buffer, const T* computed) {
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
