// The losses along rows of the native backends: what a first pass over student s and teacher t sums up of a row, the
// numbers (s0, t0, a, b, c) that follow, and the gradient that a second pass makes of them.
//
//     pkd   a row: a channel over N, H, W.       gradient = a (s - s0) - b (t - t0) + c
//           sums of d = s - pivot, e = t - pivot', d^2, e^2 and d e, the pivots numbers of the row
//     cwd   a row: a channel of an image.        gradient = a exp((s - s0) / tau) - b exp((t - t0) / tau)
//           maxima s0 and t0, sums of exp((s - s0) / tau) and exp((t - t0) / tau), and of the latter times
//           ((t - t0) - (s - s0)) / tau: t - s itself has few digits where s and t are far apart
//
// The sums of parts of a row are made in float by whatever walks over it, then moved to the row's pivots or maxima and
// added in double. frs_kernels/row_losses.py has the formulas, docs/math.md their derivation.
#pragma once

#include "pointwise.h"

namespace frs {

enum class RowLoss : int32_t { pkd, cwd, COUNT };

constexpr int NUMBERS = 5;  // of a row, and sums of a part of one

struct Sums {
  double at[NUMBERS];
};

// What of a row is known beside its sums.
struct RowOf {
  double count, rows;  // numbers in it; rows of its level
  double scale, temperature, eps;
  double pivot_s, pivot_t;
};

template <RowLoss>
struct RowTraits;

template <>
struct RowTraits<RowLoss::pkd> {
  static constexpr const char* name = "pkd";
  static constexpr bool per_image = false;

  static FRS_INLINE Sums none() { return {}; }

  // Sums of `count` numbers about other pivots, `by_s` and `by_t` above the row's.
  static FRS_INLINE Sums moved(const Sums& sums, double count, double by_s, double by_t) {
    const auto [d, e, dd, ee, de] = sums.at;
    return {{d + count * by_s, e + count * by_t, moved(dd, d, d, count, by_s, by_s), moved(ee, e, e, count, by_t, by_t),
             moved(de, d, e, count, by_s, by_t)}};
  }

  static FRS_INLINE void add(Sums& to, const Sums& part, double) {
    for (int i = 0; i < NUMBERS; ++i) to.at[i] += part.at[i];
  }

  // The row's numbers; its value times scale / rows.
  template <class T>
  static FRS_INLINE double finish(const Sums& sums, const RowOf& row, T* numbers) {
    const double n = row.count;
    for (int i = 0; i < NUMBERS; ++i) numbers[i] = 0;
    if (n < 2) return sums.at[0] * 0;  // NaN of a NaN
    const double d = sums.at[0] / n, e = sums.at[1] / n;
    const double square_s = positive(sums.at[2] - n * d * d), square_t = positive(sums.at[3] - n * e * e);
    const double most = square_s == square_t ? square_s : ::sqrt(square_s) * ::sqrt(square_t);
    const double product = within(sums.at[4] - n * d * e, most);
    const double sigma = ::sqrt(square_s / (n - 1)), rho = ::sqrt(square_t / (n - 1));
    const double p = sigma + row.eps == 0 ? 0 : 1 / (sigma + row.eps), q = rho + row.eps == 0 ? 0 : 1 / (rho + row.eps);
    const double share = row.scale / (n * row.rows), pull = sigma == 0 ? 0 : p * q * product / ((n - 1) * sigma);
    const double a = share * p * (row.eps * p * p + pull), b = share * p * q;
    numbers[0] = static_cast<T>(row.pivot_s + d);
    numbers[1] = static_cast<T>(row.pivot_t + e);
    numbers[2] = static_cast<T>(a);
    numbers[3] = static_cast<T>(b);
    numbers[4] = static_cast<T>(b * (row.pivot_t - numbers[1] + e) - a * (row.pivot_s - numbers[0] + d));
    // p^2 S + q^2 T - 2 p q X without the terms that cancel where p and q are far apart; 0 where student and teacher
    // agree. A quotient, as a product could be fused with the difference.
    const double apart = (sigma == 0 ? 0 : sigma / (sigma + row.eps)) - (rho == 0 ? 0 : rho / (rho + row.eps));
    return ((n - 1) * apart * apart + 2 * p * q * (most - product)) * (share / 2);
  }

  template <class V, class S>
  static FRS_INLINE V slope(V x, V z, V s0, V t0, V a, V b, V c, S) {
    return a * (x - s0) - (b * (z - t0) - c);
  }

 private:
  // The same for all three, so that they are the same number where student and teacher are.
  static FRS_INLINE double moved(double product, double d, double e, double count, double by_d, double by_e) {
    return product + (d * by_e + e * by_d) + count * by_d * by_e;
  }
  static FRS_INLINE double positive(double v) { return v < 0 ? 0 : v; }
  static FRS_INLINE double within(double v, double most) { return v > most ? most : v < -most ? -most : v; }
};

template <>
struct RowTraits<RowLoss::cwd> {
  static constexpr const char* name = "cwd";
  static constexpr bool per_image = true;

  static FRS_INLINE Sums none() {
    const double least = -std::numeric_limits<double>::infinity();
    return {{least, least, 0, 0, 0}};
  }

  // Sums as they are about other maxima, which are no smaller.
  static FRS_INLINE Sums raised(const Sums& sums, double s, double t, double temperature) {
    const auto [of_s, of_t, z_s, z_t, apart] = sums.at;
    const double d = below(of_s, s, temperature), e = below(of_t, t, temperature), by_t = ::exp(e);
    const double moved = z_t == 0 ? 0 : z_t * (e - d);  // of nothing the maxima are -infinity
    return {{s, t, z_s * ::exp(d), z_t * by_t, (apart + moved) * by_t}};
  }

  static FRS_INLINE void add(Sums& to, const Sums& part, double temperature) {
    const double s = larger(to.at[0], part.at[0]), t = larger(to.at[1], part.at[1]);
    const Sums more = raised(part, s, t, temperature);
    to = raised(to, s, t, temperature);
    for (int i = 2; i < NUMBERS; ++i) to.at[i] += more.at[i];
  }

  template <class T>
  static FRS_INLINE double finish(const Sums& sums, const RowOf& row, T* numbers) {
    for (int i = 0; i < NUMBERS; ++i) numbers[i] = 0;
    if (row.count == 0) return 0;
    const auto [s, t, z_s, z_t, apart] = sums.at;
    const double share = row.scale / row.rows;
    numbers[0] = static_cast<T>(s);
    numbers[1] = static_cast<T>(t);
    numbers[2] = static_cast<T>(share * row.temperature / z_s);
    numbers[3] = static_cast<T>(share * row.temperature / z_t);
    const double kl = apart / z_t + (::log(z_s) - ::log(z_t));
    return kl * (share * row.temperature * row.temperature);
  }

  template <class V, class S>
  static FRS_INLINE V slope(V x, V z, V s0, V t0, V a, V b, V, S inverse_temperature) {
    return a * exp_neg<V>((s0 - x) * inverse_temperature) - b * exp_neg<V>((t0 - z) * inverse_temperature);
  }

 private:
  static FRS_INLINE double larger(double a, double b) { return a > b ? a : b; }
  static FRS_INLINE double below(double of, double most, double temperature) {
    return of == most ? 0 : (of - most) / temperature;  // of two infinities the difference is NaN
  }
};

template <RowLoss L>
using RowConstant = std::integral_constant<RowLoss, L>;

// Calls f(RowConstant<loss>).
template <class F>
FRS_INLINE void with_row_loss(RowLoss loss, const F& f) {
  if (loss == RowLoss::pkd)
    f(RowConstant<RowLoss::pkd>{});
  else
    f(RowConstant<RowLoss::cwd>{});
}

}  // namespace frs
