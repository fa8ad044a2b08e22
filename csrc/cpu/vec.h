// Vectors of floats as wide as the instruction set has them, and rows of any dtype as runs of float or double.
#pragma once

#include <cstring>

#include "../verbs.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace frs::FRS_ISA {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int WIDTH = BYTES / 4;

typedef float F32 __attribute__((vector_size(BYTES)));
typedef double F64 __attribute__((vector_size(BYTES)));  // half as many
typedef int32_t I32 __attribute__((vector_size(BYTES)));
typedef uint32_t U32 __attribute__((vector_size(BYTES)));
typedef uint16_t U16 __attribute__((vector_size(BYTES / 2)));

template <class V>
struct Unaligned {  // what memcpy would do, in a form that GCC folds into the instruction that uses it
  typedef V type __attribute__((aligned(1), may_alias));
};
template <class V>
FRS_INLINE V load(const void* p) {
  return *static_cast<const typename Unaligned<V>::type*>(p);
}
template <class V>
FRS_INLINE void store(void* p, V v) {
  *static_cast<typename Unaligned<V>::type*>(p) = v;
}

// As the C library has it: for a beta other than 1 and 2, which few ask for. Called, not inlined: that would be sixteen
// calls in each kernel of the loss. Static: no other instruction set may take it for its own.
[[maybe_unused]] static __attribute__((noinline)) F32 power_by_lanes(F32 a, float s) {
  for (int lane = 0; lane < WIDTH; ++lane) a[lane] = ::powf(a[lane], s);
  return a;
}

}  // namespace frs::FRS_ISA

template <>
struct frs::Primitives<frs::FRS_ISA::F32> {
  using V = FRS_ISA::F32;
  using I = FRS_ISA::I32;

  static FRS_INLINE V magnitude(V x) { return (V)((I)x & 0x7fffffff); }
  static FRS_INLINE V quotient(V a, V b) { return a / b; }

  static FRS_INLINE V same_side(V x, V z, V a, V b) { return ((I)x ^ (I)z) < 0 ? b : a; }
  static FRS_INLINE V mirror(V x, V v) { return (V)((I)v ^ ((I)x & INT32_MIN)); }

  // The instructions, one instead of the two of ?:. With a NaN they return their second operand: minimum keeps one in
  // b, and maximum forgets one in a.
  static FRS_INLINE V minimum(V a, V b) {
#if defined(__AVX512F__)
    return (V)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (V)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
  }
  static FRS_INLINE V maximum(V a, V b) {
#if defined(__AVX512F__)
    return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
  }

  // exp(-a) for a >= 0, within 1.7 ulp. -a = k ln 2 + r with |r| <= ln 2 / 2, and the polynomial is e^r to 2^-28; its
  // terms are paired, not nested, since a step waits for the chain (-10 % of bce's time on a Zen 3, for 0.7 ulp). 2^k
  // is 2^(k + 64) times 2^-64, so that a subnormal result, for a above 87.3, is rounded once and not cut off.
  static FRS_INLINE V exp_neg(V a) {
    a = minimum(105.0f - V{}, a);     // exp(-105) rounds to 0
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const V shifted = a * -1.44269504f + magic;
    const V k = shifted - magic;
    V r = -a - k * 0.693359375f;  // exact: 10 bits times at most 8
    r = r + k * 2.12194440e-4f;
    const V r2 = r * r;
    const V high = 1.666652040e-1f + 4.166839079e-2f * r + r2 * (8.368745196e-3f + 1.381454010e-3f * r);
    const V p = 4.999999343e-1f * r2 + (1.0f + r) + (r2 * r) * high;
    const V scale = (V)(((I)shifted + (127 + 64)) << 23) * 0x1p-64f;  // the magic's own bits are shifted out
    return p * scale;
  }

  static FRS_INLINE V exact_exp_neg(V a) { return exp_neg(a); }

  // With t = e / (2 + e) it is 2 atanh(t) = e - t (e - t^2 P(t^2)). P is fitted on t^2 in [0, 1/9] to 2^-27.7 relative;
  // the whole stays within 1.6 ulp, also where log(1 + e) would lose all digits. Eight lanes divide beside their
  // multiplications, which are what bce keeps busy; sixteen wait for the divider (docs/design-notes.md).
  static FRS_INLINE V log1p(V e) {
#if defined(__AVX512F__)
    return log1p_by_powers(e);
#else
    const V t = e / (2.0f + e);
    const V q = t * t;
    const V p = ((2.801204871e-01f * q + 2.800179067e-01f) * q + 4.002152834e-01f) * q + 6.666641626e-01f;
    return e - t * (e - q * p);
#endif
  }

  // The exponent's, and that of what is left, in [1, 2).
  static FRS_INLINE V log(V a) {
    const I bits = (I)a, exponent = (bits >> 23) - 127;
    const V rest = (V)((bits & 0x7fffff) | 0x3f800000);
    return __builtin_convertvector(exponent, V) * 0.693147181f + log1p(rest - 1.0f);
  }

  static FRS_INLINE V power(V a, float s) { return FRS_ISA::power_by_lanes(a, s); }
};

namespace frs::FRS_ISA {

FRS_INLINE F32 bf16_to_f32(U16 v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (F32)((U32)_mm256_cvtepu16_epi32((__m128i)v) << 16);  // GCC 12 widens half by half: five instructions, not two
#else
  return (F32)(__builtin_convertvector(v, U32) << 16);
#endif
}
// Round to nearest, ties to even; a NaN becomes one that is quiet.
FRS_INLINE U16 f32_to_bf16(F32 v) {
  const U32 bits = (U32)v, nan = (U32)(v != v);
  const U32 rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) | nan) >> 16;
  return __builtin_convertvector(rounded, U16);
}

#if defined(__AVX512F__)
FRS_INLINE F32 f16_to_f32(U16 v) { return (F32)_mm512_maskz_cvtph_ps(0xffff, (__m256i)v); }
FRS_INLINE U16 f32_to_f16(F32 v) { return (U16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
FRS_INLINE F32 f16_to_f32(U16 v) { return (F32)_mm256_cvtph_ps((__m128i)v); }
FRS_INLINE U16 f32_to_f16(F32 v) { return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
// Exponent and mantissa in place, 112 more for the other bias; a subnormal number is its mantissa in the last bits of
// 0.5, less 0.5, so that nothing is subnormal in fp32 and lost where such numbers are flushed to zero.
FRS_INLINE F32 f16_to_f32(U16 v) {
  const U32 h = __builtin_convertvector(v, U32);
  const U32 sign = (h & 0x8000) << 16, rest = (h & 0x7fff) << 13;
  const U32 subnormal = (U32)((F32)((h & 0x3ff) | 0x3f000000) - 0.5f);
  const U32 finite = (h & 0x7c00) == 0 ? subnormal : rest + 0x38000000;
  return (F32)((rest >= 0x0f800000 ? rest | 0x7f800000 : finite) | sign);
}
// A normal result is rounded in the integer bits, a subnormal one by the addition of 0.5, whose ulp is fp16's smallest.
FRS_INLINE U16 f32_to_f16(F32 v) {
  const U32 bits = (U32)v, sign = (bits >> 16) & 0x8000, a = bits & 0x7fffffff;
  const U32 normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  const U32 subnormal = (U32)((F32)a + 0.5f) - 0x3f000000;
  const U32 nan = 0x7e00 | ((a >> 13) & 0x3ff);
  U32 h = a < 0x38800000 ? subnormal : normal;
  h = a >= 0x47800000 - 0x1000 ? 0x7c00 - U32{} : h;  // 65520 and beyond round to infinity
  h = a > 0x7f800000 ? nan : h;
  return __builtin_convertvector(h | sign, U16);
}
#endif

// to += v, in double: the lower lanes, then the upper ones.
FRS_INLINE void add_wide(F64 (&to)[2], F32 v) {
#if defined(__AVX512F__)
  to[0] += (F64)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0));
  to[1] += (F64)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1));
#elif defined(__AVX__)
  to[0] += (F64)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
  to[1] += (F64)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
  for (int lane = 0; lane < WIDTH; ++lane) to[lane / (WIDTH / 2)][lane % (WIDTH / 2)] += v[lane];
#endif
}

// Past the caches, for what is not read again soon; p is aligned to the vector. fence() before another thread may read.
FRS_INLINE void stream(void* p, F32 v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#else
  store(p, v);
#endif
}
FRS_INLINE void stream(void* p, U16 v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif defined(__AVX__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);
#endif
}
FRS_INLINE void fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// Each lane has what the one APART from it had.
template <int APART>
FRS_INLINE F32 swap_lanes(F32 v) {
#if defined(__clang__)
  F32 swapped = v;
  for (int lane = 0; lane < WIDTH; ++lane) swapped[lane] = v[lane ^ APART];
  return swapped;
#else  // GCC does not make a shuffle of that
  I32 from = {};
  for (int lane = 0; lane < WIDTH; ++lane) from[lane] = lane ^ APART;
  return __builtin_shuffle(v, from);
#endif
}
// A lane for each of `from`, which counts through a's lanes and then b's.
FRS_INLINE F32 both_lanes(F32 a, F32 b, I32 from) {
#if defined(__clang__)
  F32 picked = a;
  for (int lane = 0; lane < WIDTH; ++lane) picked[lane] = from[lane] < WIDTH ? a[from[lane]] : b[from[lane] - WIDTH];
  return picked;
#else
  return __builtin_shuffle(a, b, from);
#endif
}
// f over all lanes: halves meet, then quarters, and so on.
template <int APART = WIDTH / 2, class F>
FRS_INLINE float across_lanes(F32 v, const F& f) {
  v = f(v, swap_lanes<APART>(v));
  if constexpr (APART > 1)
    return across_lanes<APART / 2>(v, f);
  else
    return v[0];
}

// How numbers lie in memory: as floats, or as 16 bits of one kind or the other.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
template <class S>
struct Stored;
template <>
struct Stored<float> {
  typedef F32 V;
  static FRS_INLINE F32 widen(F32 v) { return v; }
  static FRS_INLINE F32 narrow(F32 v) { return v; }
};
template <>
struct Stored<Bf16> {
  typedef U16 V;
  static FRS_INLINE F32 widen(U16 v) { return bf16_to_f32(v); }
  static FRS_INLINE U16 narrow(F32 v) { return f32_to_bf16(v); }
};
template <>
struct Stored<F16> {
  typedef U16 V;
  static FRS_INLINE F32 widen(U16 v) { return f16_to_f32(v); }
  static FRS_INLINE U16 narrow(F32 v) { return f32_to_f16(v); }
};

// WIDTH numbers as floats, or `size` of them and then zeros; and back.
template <class S>
FRS_INLINE F32 load_wide(const S* p) {
  return Stored<S>::widen(load<typename Stored<S>::V>(p));
}
template <class S>
FRS_INLINE F32 load_wide(const S* p, int64_t size) {
  typename Stored<S>::V v = {};
  memcpy(&v, p, size * sizeof(S));
  return Stored<S>::widen(v);
}
template <class S>
FRS_INLINE void store_narrow(S* p, F32 v) {
  store(p, Stored<S>::narrow(v));
}
template <class S>
FRS_INLINE void store_narrow(S* p, F32 v, int64_t size) {
  const auto narrow = Stored<S>::narrow(v);
  memcpy(p, &narrow, size * sizeof(S));
}

// One value, for gathers and the ends of rows.
FRS_INLINE double one(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(data)[at];
    case DType::f64: return static_cast<const double*>(data)[at];
    case DType::bf16: return bf16_to_f32(U16{static_cast<const uint16_t*>(data)[at]})[0];
    case DType::f16: return f16_to_f32(U16{static_cast<const uint16_t*>(data)[at]})[0];
  }
  __builtin_unreachable();
}
FRS_INLINE void put(void* data, DType dtype, int64_t at, double v) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(data)[at] = static_cast<float>(v); return;
    case DType::f64: static_cast<double*>(data)[at] = v; return;
    case DType::bf16: static_cast<uint16_t*>(data)[at] = f32_to_bf16(F32{static_cast<float>(v)})[0]; return;
    case DType::f16: static_cast<uint16_t*>(data)[at] = f32_to_f16(F32{static_cast<float>(v)})[0]; return;
  }
}

// The same for what is kept in S, which the dtype is where S has 16 bits.
template <class S>
FRS_INLINE S item(const void* data, DType, int64_t at) {
  return static_cast<const S*>(data)[at];
}
template <>
FRS_INLINE double item<double>(const void* data, DType dtype, int64_t at) {
  return one(data, dtype, at);
}
template <>
FRS_INLINE float item<float>(const void* data, DType dtype, int64_t at) {
  return static_cast<float>(one(data, dtype, at));
}
FRS_INLINE void put(void* data, DType, int64_t at, Bf16 v) { static_cast<Bf16*>(data)[at] = v; }
FRS_INLINE void put(void* data, DType, int64_t at, F16 v) { static_cast<F16*>(data)[at] = v; }

}  // namespace frs::FRS_ISA
