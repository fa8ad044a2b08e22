// The pointwise maths of the native backends: loss and slope of a student's value x against a teacher's z.
//
//     mse         value = d^2                                slope = 2 d                d = x - z
//     l1          value = |d|                                slope = sign(d)
//     smooth_l1   value = d^2 / (2 beta), |d| - beta / 2     slope = d / beta, sign(d)  where |d| < beta, else
//     bce         value = log1p(e) + |x| miss                slope = sign(x) (miss - tail)  = sigmoid(x) - sigmoid(z)
//     kl          value = bce(x, z) - bce(z, z)              slope as bce
//     qfl         value = |d|^beta bce                       slope = |d|^beta d + beta |d|^(beta-1) sign(d) p (1-p) bce
//     qfl_detached        as qfl                             slope = |d|^beta d         d = p - q, the slope of bce
//
// with e = exp(-|x|), tail = e / (1 + e) = sigmoid(-|x|), and miss = sigmoid(-z) where x >= 0, sigmoid(z) where x < 0;
// p = sigmoid(x), q = sigmoid(z).
// Mirrored so that the student is on the positive side, nothing cancels where a logit saturates (docs/math.md).
//
// V is float or double, on the host or on a GPU, or a GCC vector of floats (csrc/cpu/vec.h): the operators and ?: mean
// the same for all of them; what differs is in Primitives<V>.
//
// A loss is a name in Loss and its Traits; nothing else in csrc/ names it. One of groups of channels has a value and a
// slope only together with the others of its group: softmax.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define FRS_INLINE __host__ __device__ __forceinline__
#else
#define FRS_INLINE inline __attribute__((always_inline))
#endif

namespace frs {

enum class Loss : int32_t {
  mse,
  l1,
  smooth_l1,
  bce,
  kl,
  qfl,
  qfl_detached,
  POINTWISE,  // how many are
  softmax_kl = POINTWISE,
  COUNT
};

constexpr bool is_grouped(Loss loss) { return loss >= Loss::POINTWISE; }

template <class V>
struct Pointwise {
  V value, slope;
};

// What is not the same for all V: |x|; exp(-a) for a >= 0, and the same where it is called once a position; a / b for b
// in [1, 6]; log1p(e) for e in [0, 1]; log(a) for a >= 1; power(a, s) = a^s for a normal a <= 1 and s > -1; and by the
// signs of the logits
//     same_side(x, z, a, b)   a where x and z have the same sign, else b
//     mirror(x, v)            v where x >= 0, else -v
// A vector reads the sign bit: the comparisons take the ports that multiply.
template <class V>
struct Primitives;

// log1p(e) as e + e^2 Q(e), Q fitted on [0, 1] to 2^-24.8 of the whole: all digits stay where e is small, logits below
// -9, most of a detector's. On a GPU it is 9 instructions, and takes none of the 16 reciprocals a clock of a
// multiprocessor.
template <class V>
FRS_INLINE V log1p_by_powers(V e) {
  V q = 5.364822689e-03f * e - 3.006578609e-02f;
  q = q * e + 7.920452207e-02f;
  q = q * e - 1.375380158e-01f;
  q = q * e + 1.915365458e-01f;
  q = q * e - 2.485716343e-01f;
  q = q * e + 3.332132399e-01f;
  q = q * e - 4.999964833e-01f;
  return (q * e) * e + e;
}

template <class V>
struct BySign {
  static FRS_INLINE V same_side(V x, V z, V a, V b) { return (x >= 0) == (z >= 0) ? a : b; }
  static FRS_INLINE V mirror(V x, V v) { return x >= 0 ? v : -v; }
};

template <>
struct Primitives<float> : BySign<float> {
  static FRS_INLINE float magnitude(float x) { return ::fabsf(x); }
  // One instruction after the product, whose rounding a costs |a| half ulps: at a = 9, 5e-7 of a loss of 1e-4.
  static FRS_INLINE float exp_neg(float a) { return power_of_two(a * -1.44269504f); }
  static FRS_INLINE float power_of_two(float a) {
#if defined(__CUDA_ARCH__)
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(a));
    return e;
#else
    return ::exp2f(a);
#endif
  }
  static FRS_INLINE float exact_exp_neg(float a) { return ::expf(-a); }
  static FRS_INLINE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
    float inverse;  // the divisor is in [1, 6]: no denormal to guard against
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    return a * inverse;
#else
    return a / b;
#endif
  }
  static FRS_INLINE float log1p(float e) { return log1p_by_powers(e); }
  static FRS_INLINE float log(float a) { return ::logf(a); }
  // With a = 2^k m, m around 1, it is 2^n 2^f with n whole and f = s k - n + s log2(m): the logarithm is good to 2^-22,
  // also far from 1, where that of a itself would lose a digit or two.
  static FRS_INLINE float power(float a, float s) {
#if defined(__CUDA_ARCH__)
    const int bits = __float_as_int(a), k = (bits - 0x3f3504f3) >> 23;
    float log2_m, fraction, whole;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2_m) : "f"(__int_as_float(bits - (k << 23))));
    const float n = ::rintf(s * (k + log2_m)), f = ::fmaf(s, log2_m, ::fmaf(s, k, -n));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(fraction) : "f"(f));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(whole) : "f"(n));
    return fraction * whole;
#else
    return ::powf(a, s);
#endif
  }
};

template <>
struct Primitives<double> : BySign<double> {
  static FRS_INLINE double magnitude(double x) { return ::fabs(x); }
  static FRS_INLINE double exp_neg(double a) { return ::exp(-a); }
  static FRS_INLINE double power_of_two(double a) { return ::exp2(a); }
  static FRS_INLINE double exact_exp_neg(double a) { return ::exp(-a); }
  static FRS_INLINE double quotient(double a, double b) { return a / b; }
  static FRS_INLINE double log1p(double e) { return ::log1p(e); }
  static FRS_INLINE double log(double a) { return ::log(a); }
  static FRS_INLINE double power(double a, double s) { return ::pow(a, s); }
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

// Of one number a position, not a value: exp to the last ulps, also where all scores of a level are tiny.
template <class V>
FRS_INLINE V sigmoid(V x) {
  const V e = Primitives<V>::exact_exp_neg(magnitude(x));
  return quotient<V>(x >= 0 ? 1.0f : e, 1.0f + e);
}

// The sign of d; 0 of 0, and a NaN of a NaN.
template <class V>
FRS_INLINE V sign(V d) {
  const V one = 1.0f - V{};
  return d > 0 ? one : d < 0 ? -one : d;
}

// One reciprocal for both logits: tail = e (1 + e_z) r and tail_z = e_z (1 + e) r with r = 1 / ((1 + e)(1 + e_z)), so
// that miss - tail is r (e_z - e), or r (1 - e e_z) where the signs differ: nothing is rounded before it cancels, and
// the gradient is 0 where student and teacher agree.
template <bool KL, class V>
FRS_INLINE Pointwise<V> bernoulli(V x, V z) {
  const V e = exp_neg(magnitude(x)), e_z = exp_neg(magnitude(z));
  const V u = 1.0f + e, r = quotient<V>(1.0f - V{}, u * (1.0f + e_z)), ur = u * r;
  const V miss = Primitives<V>::same_side(x, z, e_z * ur, ur);
  const V slope = r * Primitives<V>::same_side(x, z, e_z - e, 1.0f - e * e_z);
  V value = Primitives<V>::log1p(e) + magnitude(x) * miss;
  if constexpr (KL) value = value - (Primitives<V>::log1p(e_z) + magnitude(z) * (e_z * ur));
  return {value, Primitives<V>::mirror(x, slope)};
}

// bce times |d|^beta. One power serves both parts of the slope, which have the same sign: nothing cancels. It is that
// of the smallest normal number where |d| is less. So it is finite, and 0 times it is 0 where student and teacher
// agree, also for beta < 1, whose |d|^(beta - 1) is infinite there. All numbers of a term have the same beta.
template <bool DETACHED, class V, class S>
FRS_INLINE Pointwise<V> quality_focal(V x, V z, S beta) {
  const Pointwise<V> bce = bernoulli<false>(x, z);
  if (beta == 0) return bce;
  const V d = bce.slope, a = magnitude(d), least = std::numeric_limits<S>::min() - V{};
  V power = 1.0f - V{};  // |d|^(beta - 1)
  if (beta == 2)
    power = a;
  else if (beta != 1)
    power = Primitives<V>::power(a < least ? least : a, beta - 1);
  const V weight = a * power;
  V slope = weight * d;
  if constexpr (!DETACHED) {
    const V e = exp_neg(magnitude(x)), head = quotient<V>(1.0f - V{}, 1.0f + e);
    slope = slope + sign(d) * ((beta * power) * (e * head * head) * bce.value);
  }
  return {weight * bce.value, slope};
}

// A loss: its name; whether it takes logits, which a temperature divides; and of a pointwise one value and slope, given
// the beta of smooth_l1 and qfl in the scalar type of V.
template <Loss>
struct Traits;

template <>
struct Traits<Loss::mse> {
  static constexpr const char* name = "mse";
  static constexpr bool takes_logits = false;
  template <class V, class S>
  static FRS_INLINE Pointwise<V> at(V x, V z, S) {
    const V d = x - z;
    return {d * d, d + d};
  }
};

template <>
struct Traits<Loss::l1> {
  static constexpr const char* name = "l1";
  static constexpr bool takes_logits = false;
  template <class V, class S>
  static FRS_INLINE Pointwise<V> at(V x, V z, S) {
    const V d = x - z;
    return {magnitude(d), sign(d)};
  }
};

template <>
struct Traits<Loss::smooth_l1> {
  static constexpr const char* name = "smooth_l1";
  static constexpr bool takes_logits = false;
  template <class V, class S>
  static FRS_INLINE Pointwise<V> at(V x, V z, S beta) {
    const V d = x - z, a = magnitude(d), far = a - beta * 0.5f;
    const S inverse = beta >= std::numeric_limits<S>::min() ? 1 / beta : S(0);  // 0 times infinity is no slope
    return {a < beta ? d * d * (inverse * 0.5f) : far, a < beta ? d * inverse : sign(d)};
  }
};

template <>
struct Traits<Loss::bce> {
  static constexpr const char* name = "bce";
  static constexpr bool takes_logits = true;
  template <class V, class S>
  static FRS_INLINE Pointwise<V> at(V x, V z, S) {
    return bernoulli<false>(x, z);
  }
};

template <>
struct Traits<Loss::kl> {
  static constexpr const char* name = "kl";
  static constexpr bool takes_logits = true;
  template <class V, class S>
  static FRS_INLINE Pointwise<V> at(V x, V z, S) {
    return bernoulli<true>(x, z);
  }
};

template <>
struct Traits<Loss::qfl> {
  static constexpr const char* name = "qfl";
  static constexpr bool takes_logits = true;
  template <class V, class S>
  static FRS_INLINE Pointwise<V> at(V x, V z, S beta) {
    return quality_focal<false>(x, z, beta);
  }
};

template <>
struct Traits<Loss::qfl_detached> {
  static constexpr const char* name = "qfl_detached";
  static constexpr bool takes_logits = true;
  template <class V, class S>
  static FRS_INLINE Pointwise<V> at(V x, V z, S beta) {
    return quality_focal<true>(x, z, beta);
  }
};

template <>
struct Traits<Loss::softmax_kl> {
  static constexpr const char* name = "softmax_kl";
  static constexpr bool takes_logits = true;
};

template <Loss L>
using LossConstant = std::integral_constant<Loss, L>;

// Losses known when a kernel is compiled. with(loss, f) calls f(LossConstant<loss>) and returns true if it is one.
template <Loss... L>
struct Losses {
  template <class F>
  static FRS_INLINE bool with(Loss loss, const F& f) {
    return (... || (loss == L && (f(LossConstant<L>{}), true)));
  }
  static constexpr bool contain(Loss loss) { return (... || (loss == L)); }
};

template <class Numbers>
struct Numbered;
template <int... I>
struct Numbered<std::integer_sequence<int, I...>> {
  using type = Losses<static_cast<Loss>(I)...>;
};
// One without Traits does not compile.
using EveryLoss = Numbered<std::make_integer_sequence<int, static_cast<int>(Loss::COUNT)>>::type;
using EveryPointwise = Numbered<std::make_integer_sequence<int, static_cast<int>(Loss::POINTWISE)>>::type;

}  // namespace frs
