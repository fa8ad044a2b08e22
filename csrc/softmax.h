// The maths of softmax_kl, of a group of logits x against z at one position: with maxima m_x and m_z, in units of tau,
//
//     e_x = exp(x - m_x),  Z_x = sum e_x       p = e_x / Z_x       and so e_z, Z_z and q of z
//     value  = sum q (log q - log p) = sum q (exp(t) - 1 - t)      t = log p - log q
//     slope  = p - q
//
// The second form of the value, which holds as p and q have the same sum, has no negative term: nothing cancels where
// student and teacher nearly agree (docs/math.md). An error that all t of a group share, such as that of the
// logarithms, moves it by its square.
#pragma once

#include "pointwise.h"

namespace frs {

// exp(t) - 1 - t for |t| <= 1: t^2 times a polynomial, fitted to 2^-26.6 of the whole.
template <class V>
FRS_INLINE V excess(V t) {
  V q = 2.772283083e-06f * t + 2.535482963e-05f;
  q = q * t + 1.984402424e-04f;
  q = q * t + 1.388545148e-03f;
  q = q * t + 8.333310485e-03f;
  q = q * t + 4.166673496e-02f;
  q = q * t + 1.666666716e-01f;
  q = q * t + 0.5f;
  return t * t * q;
}
template <>
FRS_INLINE double excess<double>(double t) {
  return ::expm1(t) - t;
}

// What a group's maxima and sums come to. In units of 1 / Z_x a p is e_x and a q is ratio e_z. Where x and z are the
// same numbers ratio is 1 and shift 0, so that value and slope are 0, also where a product is fused with what follows.
template <class V>
struct Softmax {
  V ratio, shift;

  template <class S>
  static FRS_INLINE Softmax of(V m_x, V m_z, V z_x, V z_z, S inverse_temperature) {
    const V logs = Primitives<V>::log(z_x) - Primitives<V>::log(z_z);
    return {z_x / z_z, (m_x - m_z) * inverse_temperature + logs};
  }

  // Value and slope times Z_x, of logits that differ by d = (x - z) / tau.
  FRS_INLINE Pointwise<V> at(V e_x, V e_z, V d) const {
    const V any = d - shift, most = std::numeric_limits<float>::max() - V{};
    const V t = any > most ? most : any;  // of a class that the teacher masks with -inf: 0 times infinity is none
    const V q = e_z * ratio, slope = e_x - q;
    return {magnitude(t) < 1.0f ? q * excess(t) : slope - q * t, slope};
  }
};

}  // namespace frs
