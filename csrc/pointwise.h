// The pointwise maths of the native backends: loss and slope of a student's value x against a teacher's z.
//
//     mse   value = (x - z)^2                     slope = 2 (x - z)
//     bce   value = log1p(e) + |x| miss           slope = sign(x) (miss - tail)  = sigmoid(x) - sigmoid(z)
//     kl    value = bce(x, z) - bce(z, z)         slope as bce
//
// with e = exp(-|x|), tail = e / (1 + e) = sigmoid(-|x|), and miss = sigmoid(-z) where x >= 0, sigmoid(z) where x < 0.
// Mirrored so that the student is on the positive side, nothing cancels where a logit saturates (docs/math.md).
//
// V is float or double, on the host or on a GPU, or a GCC vector of floats (csrc/cpu/vec.h): the operators and ?: mean
// the same for all of them; what differs is in Primitives<V>.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FRS_INLINE __host__ __device__ __forceinline__
#else
#define FRS_INLINE inline __attribute__((always_inline))
#endif

namespace frs {

enum class Loss { mse, bce, kl };

template <class V>
struct Pointwise {
  V value, slope;
};

// What is not the same for all V: |x|; exp(-a) for a >= 0; a / b for b in [1, 6]; and by the signs of the logits
//     same_side(x, z, a, b)   a where x and z have the same sign, else b
//     mirror(x, v)            v where x >= 0, else -v
// A vector reads the sign bit: the comparisons take the ports that multiply.
template <class V>
struct Primitives;

template <class V>
struct BySign {
  static FRS_INLINE V same_side(V x, V z, V a, V b) { return (x >= 0) == (z >= 0) ? a : b; }
  static FRS_INLINE V mirror(V x, V v) { return x >= 0 ? v : -v; }
};

template <>
struct Primitives<float> : BySign<float> {
  static FRS_INLINE float magnitude(float x) { return ::fabsf(x); }
  // A GPU's expf is ex2.approx after an exact reduction: 2 ulp and 6 instructions, where the polynomial of vec.h takes
  // 17. An H100 has some 50 a value before bce in bf16 is bound by them and not by memory.
  static FRS_INLINE float exp_neg(float a) { return ::expf(-a); }
  static FRS_INLINE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdividef(a, b);  // 2 ulp and no branch
#else
    return a / b;
#endif
  }
};

template <>
struct Primitives<double> : BySign<double> {
  static FRS_INLINE double magnitude(double x) { return ::fabs(x); }
  static FRS_INLINE double exp_neg(double a) { return ::exp(-a); }
  static FRS_INLINE double quotient(double a, double b) { return a / b; }
};

template <class V>
FRS_INLINE V magnitude(V x) {
  return Primitives<V>::magnitude(x);
}

template <class V>
FRS_INLINE V exp_neg(V a) {
  return Primitives<V>::exp_neg(a);
}

template <class V>
FRS_INLINE V quotient(V a, V b) {
  return Primitives<V>::quotient(a, b);
}

template <class V>
FRS_INLINE V sigmoid(V x) {
  const V e = exp_neg(magnitude(x));
  return quotient<V>(x >= 0 ? 1.0f : e, 1.0f + e);
}

// e / (1 + e) for e in [0, 1]. The same for student and teacher, so that the gradient is 0 where they agree.
template <class V>
FRS_INLINE V tail_of(V e) {
  return quotient<V>(e, 1.0f + e);
}

// log1p(e) for e in [0, 1]: with t = e / (2 + e) it is 2 atanh(t) = e - t (e - t^2 P(t^2)). P is fitted on t^2 in
// [0, 1/9] to 2^-27.7 relative; the whole stays within 1.6 ulp, also where log(1 + e) would lose all digits: logits
// below -9, most of a detector's.
template <class V>
FRS_INLINE V log1p_of(V e) {
  const V t = quotient<V>(e, 2.0f + e);
  const V q = t * t;
  const V p = ((2.801204871e-01f * q + 2.800179067e-01f) * q + 4.002152834e-01f) * q + 6.666641626e-01f;
  return e - t * (e - q * p);
}

FRS_INLINE double log1p_of(double e) { return ::log1p(e); }

template <bool KL, class V>
FRS_INLINE Pointwise<V> bernoulli(V x, V z) {
  const V e = exp_neg(magnitude(x)), e_z = exp_neg(magnitude(z));
  const V tail = tail_of(e), tail_z = tail_of(e_z);
  const V miss = Primitives<V>::same_side(x, z, tail_z, 1.0f - tail_z);
  V value = log1p_of(e) + magnitude(x) * miss;
  if constexpr (KL) value = value - (log1p_of(e_z) + magnitude(z) * tail_z);
  return {value, Primitives<V>::mirror(x, miss - tail)};
}

// Of the logits over the temperature; mse ignores it. S is the scalar type of V. The loss is the value times the
// temperature squared, its derivative the slope times the temperature: the caller applies both, once for many values.
template <Loss LOSS, class V, class S>
FRS_INLINE Pointwise<V> pointwise(V x, V z, S inverse_temperature) {
  if constexpr (LOSS == Loss::mse) {
    const V d = x - z;
    return {d * d, d + d};
  } else {
    return bernoulli<LOSS == Loss::kl>(x * inverse_temperature, z * inverse_temperature);
  }
}

}  // namespace frs
